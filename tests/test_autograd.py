"""Derivatives that are given by hand have right second ones, or an error from every way to ask for one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.functional import hessian, hvp

from pyro_sparse._autograd import differentiable_once, only_again

S = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)


def plain(s: Tensor) -> Tensor:
    return (s**3).sum()


def once(s: Tensor) -> Tensor:
    return differentiable_once(plain(s), "told")


def test_value_and_first_derivative_are_those_of_the_tensor() -> None:
    s = S.clone().requires_grad_()
    assert torch.equal(once(s), plain(s))
    assert torch.equal(torch.autograd.grad(once(s), s)[0], 3 * S**2)
    once(s).backward()
    assert torch.equal(s.grad, 3 * S**2)


@pytest.mark.slow  # torch.func takes long to import
def test_under_torch_func() -> None:
    assert torch.equal(torch.func.grad(once)(S), 3 * S**2)
    torch.testing.assert_close(torch.vmap(torch.func.grad(once))(S.expand(2, 3)), (3 * S**2).expand(2, 3))
    with pytest.raises(RuntimeError, match=r"^told$"):
        torch.func.jacrev(torch.func.grad(once))(S)


@pytest.mark.parametrize(
    "again",
    [
        lambda d, s: torch.autograd.grad(d[0], s),
        lambda d, s: d.sum().backward(),
        lambda d, s: hessian(once, S),
        lambda d, s: hvp(once, S, S),
    ],
    ids=["grad", "backward", "hessian", "hvp"],
)
def test_the_second_raises(again: object) -> None:
    s = S.clone().requires_grad_()
    (d,) = torch.autograd.grad(once(s), s, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^told$"):
        again(d, s)  # type: ignore[operator]


class _Torchs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def test_torchs_own_once_differentiable_is_silent() -> None:
    s = S.clone().requires_grad_()
    (d,) = torch.autograd.grad(_Torchs.apply(plain(s)), s, create_graph=True)
    assert torch.autograd.grad(d.sum(), s)[0].isfinite().all()


def test_by_what_comes_after_it_is_right() -> None:
    x, w = (torch.tensor(v, requires_grad=True) for v in (0.3, 0.7))
    (first,) = torch.autograd.grad((w * differentiable_once(x.square(), "told")).sin(), x, create_graph=True)
    (mixed,) = torch.autograd.grad(first, w)
    expected = hessian(lambda x, w: (w * x.square()).sin(), (x.detach(), w.detach()))
    torch.testing.assert_close(mixed, expected[0][1])


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")  # by torch itself
def test_in_a_trace() -> None:
    s = S.clone().requires_grad_()
    traced = torch.jit.trace(once, s, check_trace=False)
    torch.testing.assert_close(torch.autograd.grad(traced(s), s)[0], 3 * S**2)


def test_only_again_has_what_its_derivative_has() -> None:
    def zero(x: Tensor) -> Tensor:
        return (x - x.detach()).square() / 2

    x = torch.tensor(0.3, requires_grad=True)
    value = only_again(zero(x))
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    assert value == 0 and first == 0
    assert torch.autograd.grad(first, x)[0] == 1
