"""Derivatives that are given by hand have right second ones, or an error from every way to ask for one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_sparse._autograd import differentiable_once, only_again

MESSAGE = "expected to be differentiated once"


def once(x: Tensor) -> Tensor:
    return differentiable_once(x.square(), MESSAGE).sin().sum()


def test_the_first_derivative_is_there() -> None:
    x = torch.tensor([0.3, 0.7], requires_grad=True)
    (got,) = torch.autograd.grad(once(x), x, create_graph=True)
    torch.testing.assert_close(got, 2 * x * x.square().cos())


def test_a_second_one_is_an_error_whoever_asks() -> None:
    x = torch.tensor([0.3, 0.7], requires_grad=True)
    (first,) = torch.autograd.grad(once(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.autograd.grad(first.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match=MESSAGE):
        first.sum().backward()
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.autograd.functional.hessian(once, x.detach())


def test_by_what_comes_after_it_is_right() -> None:
    x, w = (torch.tensor(v, requires_grad=True) for v in (0.3, 0.7))
    (first,) = torch.autograd.grad((w * differentiable_once(x.square(), MESSAGE)).sin(), x, create_graph=True)
    (mixed,) = torch.autograd.grad(first, w)
    expected = torch.autograd.functional.hessian(lambda x, w: (w * x.square()).sin(), (x.detach(), w.detach()))
    torch.testing.assert_close(mixed, expected[0][1])


@pytest.mark.filterwarnings("ignore")
def test_under_torch_func_and_in_a_trace() -> None:
    x = torch.tensor([0.3, 0.7], requires_grad=True)
    torch.testing.assert_close(torch.func.grad(once)(x.detach()), 2 * x * x.square().cos())
    traced = torch.jit.trace(once, x, check_trace=False)
    torch.testing.assert_close(torch.autograd.grad(traced(x), x)[0], 2 * x * x.square().cos())


def test_only_again_has_what_its_derivative_has() -> None:
    def zero(x: Tensor) -> Tensor:
        return (x - x.detach()).square() / 2

    x = torch.tensor(0.3, requires_grad=True)
    value = only_again(zero(x))
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    assert value == 0 and first == 0
    assert torch.autograd.grad(first, x)[0] == 1
