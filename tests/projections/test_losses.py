"""The losses against the entmax package, against finite differences, and against what the projections say."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import entmax as peer
import pyro
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyro_sparse.projections import entmax, entmax15, entmax15_loss, entmax_loss, sparsemax, sparsemax_loss

Loss = Callable[..., Tensor]
#: name: the loss, its projection, alpha
LOSSES: dict[str, tuple[Loss, Callable[..., Tensor], float]] = {
    "sparsemax": (sparsemax_loss, sparsemax, 2.0),
    "entmax15": (entmax15_loss, entmax15, 1.5),
    "entmax1.2": (functools.partial(entmax_loss, alpha=1.2), functools.partial(entmax, alpha=1.2), 1.2),
    "entmax3": (functools.partial(entmax_loss, alpha=3.0), functools.partial(entmax, alpha=3.0), 3.0),
}
every = pytest.mark.parametrize("name", LOSSES)
LABELS = torch.arange(12) % 6
far = pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1e3])


def scores(scale: float = 1.0, rows: int = 12, size: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return (scale * torch.randn(rows, size, generator=g, dtype=torch.float64)).requires_grad_()


def entropy(p: Tensor, alpha: float) -> Tensor:
    return (1 - (p**alpha).sum(-1)) / (alpha * (alpha - 1))


@every
@far
def test_value_and_gradient(name: str, scale: float) -> None:
    """Of classes and of probabilities, by the formula; p - q is the gradient, at labels outside the support too."""
    loss, project, alpha = LOSSES[name]
    x = scores(scale)
    p, one_hot = project(x), torch.nn.functional.one_hot(LABELS, 6).double()
    soft = torch.roll(p.detach(), 1, 0)
    assert scale < 1 or (p.gather(-1, LABELS.unsqueeze(-1)) == 0).any()
    for target, q in ((LABELS, one_hot), (one_hot, one_hot), (soft, soft)):
        value = loss(x, target)
        expected = ((p - q) * x).sum(-1) + entropy(p, alpha) - entropy(q, alpha)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
        assert value.isfinite().all() and (value > -1e-12).all()
        (gradient,) = torch.autograd.grad(value.sum(), x)
        torch.testing.assert_close(gradient, p - q, rtol=1e-9, atol=1e-9)
    zero = loss(x, p.detach())
    torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["sparsemax", "entmax15", "entmax1.2"])
def test_against_a_peer(name: str) -> None:
    loss, _, alpha = LOSSES[name]
    for scale in (0.3, 3.0):
        x = scores(scale)
        theirs = {2.0: peer.sparsemax_loss, 1.5: peer.entmax15_loss}.get(alpha)
        expected = theirs(x, LABELS) if theirs else peer.entmax_bisect_loss(x, LABELS, alpha=alpha, n_iter=60)
        torch.testing.assert_close(loss(x, LABELS), expected.reshape(-1), rtol=1e-7, atol=1e-7)


@every
def test_derivatives(name: str) -> None:
    """The first two by finite differences; the second is the projection's first."""
    loss, project, _ = LOSSES[name]
    x = scores(1.0, 4)
    assert gradcheck(lambda x: loss(x, LABELS[:4]), (x,), atol=1e-6)
    assert gradgradcheck(lambda x: loss(x, LABELS[:4]), (x,), atol=1e-5)
    for row in x.detach():
        hessian = torch.autograd.functional.hessian(lambda x: loss(x, LABELS[0]), row)
        torch.testing.assert_close(hessian, torch.autograd.functional.jacobian(project, row))


@pytest.mark.slow
def test_derivative_in_alpha_and_in_the_target() -> None:
    x, alpha = scores(1.0, 4), torch.tensor([[1.3], [1.5], [2.0], [2.5]], requires_grad=True)
    q = scores(2.0, 4).softmax(-1).detach().requires_grad_()
    assert gradcheck(lambda x, a: entmax_loss(x, LABELS[:4], a), (x, alpha), atol=1e-6)
    assert gradgradcheck(lambda x, a: entmax_loss(x, LABELS[:4], a), (x, alpha), atol=1e-5)
    assert gradcheck(lambda x, q, a: entmax_loss(x, q, a), (x, q, alpha), atol=1e-6)
    for i, a in enumerate(alpha.flatten().tolist()):
        torch.testing.assert_close(entmax_loss(x, q, alpha)[i], entmax_loss(x[i], q[i], a))


def test_near_softmax_it_is_the_cross_entropy() -> None:
    x = scores()
    expected = torch.nn.functional.cross_entropy(x, LABELS, reduction="none")
    torch.testing.assert_close(entmax_loss(x, LABELS, 1 + 1e-6), expected, rtol=1e-4, atol=1e-4)


@every
def test_margin(name: str) -> None:
    """It is zero from a lead of 1 / (alpha - 1) on, and not before."""
    loss, _, alpha = LOSSES[name]
    lead = 1 / (alpha - 1)
    x = torch.zeros(3, 4)
    x[:, 1] = torch.tensor([lead - 0.1, lead, lead + 7.0])
    value = loss(x, torch.tensor([1, 1, 1]))
    assert value[0] > 1e-12 and value[1:].abs().max() < 1e-14
    assert math.isclose(float(loss(x, torch.tensor([0, 0, 0]))[2]), lead + 7.0)


@every
def test_shapes_dims_and_dtypes(name: str) -> None:
    loss = LOSSES[name][0]
    x = scores().reshape(3, 4, 6)
    y = LABELS.reshape(3, 4)
    value = loss(x, y)
    assert value.shape == (3, 4)
    torch.testing.assert_close(loss(x.movedim(-1, 0), y, dim=0), value)
    torch.testing.assert_close(loss(x.movedim(-1, 1), torch.nn.functional.one_hot(y, 6).double().mT, dim=1), value)
    torch.testing.assert_close(loss(x.movedim(-1, 1), y, dim=-2), value)
    torch.testing.assert_close(loss(x, y[0]), loss(x, y[:1].expand(3, 4)))  # targets broadcast
    torch.testing.assert_close(loss(x[0], y), loss(x[:1].expand(3, 4, 6), y))  # and scores
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        low = loss(x.to(dtype), y.int())
        assert low.dtype == dtype
        torch.testing.assert_close(low.double(), value, rtol=tolerance, atol=tolerance)
    assert loss(x[0, 0], y[0, 0]).shape == ()
    assert loss(x[:0], y[:0]).shape == (0, 4)


@every
def test_outcomes_that_are_ruled_out(name: str) -> None:
    loss, project, _ = LOSSES[name]
    x = torch.tensor([[1.0, -math.inf, 0.2, 0.0]] * 2, requires_grad=True)
    short = x.detach()[:, [0, 2, 3]].requires_grad_()
    value, expected = loss(x, torch.tensor([2, 0])), loss(short, torch.tensor([1, 0]))
    torch.testing.assert_close(value, expected)
    (gradient,), (other,) = torch.autograd.grad(value.sum(), x), torch.autograd.grad(expected.sum(), short)
    torch.testing.assert_close(gradient[:, [0, 2, 3]], other)
    assert (gradient[:, 1] == 0).all()
    soft = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert loss(x, soft).isfinite().tolist() == [True, False]
    assert loss(x, torch.tensor([1, 0])).tolist()[0] == math.inf
    assert loss(torch.tensor([[0.0, math.nan], [0.0, 1.0]]), torch.tensor([0, 0])).isnan().tolist() == [True, False]
    assert project(x).shape == x.shape


@every
def test_under_torch_func(name: str) -> None:
    loss, project, _ = LOSSES[name]
    x = scores().detach()
    torch.testing.assert_close(torch.vmap(loss)(x, LABELS), loss(x, LABELS))
    each = torch.vmap(torch.func.grad(loss))(x, LABELS)
    torch.testing.assert_close(each, project(x) - torch.nn.functional.one_hot(LABELS, 6), rtol=1e-9, atol=1e-9)
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(x[0], LABELS[0])
    torch.testing.assert_close(hessian, torch.func.jacrev(project)(x[0]))


@every
def test_descent_brings_a_label_into_the_support(name: str) -> None:
    """What log-probabilities of minus infinity, which have no gradient, cannot do."""
    loss, project, _ = LOSSES[name]
    x, label = torch.tensor([4.0, 0.0, 0.0]), torch.tensor(2)
    assert project(x)[2] == 0 or name == "entmax1.2"
    for _ in range(60):
        x = x.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x, label), x)
        x = (x - 0.3 * gradient).detach()
    assert project(x)[2] > 0.8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sparsemax_loss([1.0], torch.tensor(0)), TypeError, "sparsemax_loss: expected a floating-point tensor"),
        (lambda: sparsemax_loss(torch.ones(2, 3), 1), TypeError, "expected target to be a tensor, got int"),
        (
            lambda: entmax15_loss(torch.ones(2, 3), torch.ones(2)),
            ValueError,
            r"\(2, 3\), got probabilities of",
        ),
        (lambda: sparsemax_loss(torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"\(2, 3\), got probabilities"),
        (
            lambda: sparsemax_loss(torch.ones(2, 3), LABELS[:3]),
            ValueError,
            r"\(2,\), got class numbers",
        ),
        (lambda: sparsemax_loss(torch.ones(2, 3), LABELS[2:4]), ValueError, "classes from 0 to 2, got 2 to 3"),
        (lambda: sparsemax_loss(torch.ones(2, 3), LABELS[:2], 2), ValueError, "expected dim to be a dimension"),
        (lambda: entmax_loss(torch.ones(2, 3), LABELS[:2], 1.0), ValueError, "expected alpha > 1"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_as_a_factor_for_labels() -> None:
    """Of labels outside the support at the start, whose log-probability is -inf: a finite loss, which trains."""
    x, labels = 3 * torch.eye(4), torch.tensor([1, 2, 3, 0])
    encoder = torch.nn.Linear(4, 4)
    encoder.weight.data.copy_(torch.eye(4))

    def model(x: Tensor) -> None:
        with pyro.plate("data", 4):
            pyro.factor("y", -sparsemax_loss(encoder(x), labels))

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)

    assert (sparsemax(encoder(x)).gather(-1, labels.unsqueeze(-1)) == 0).all()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert math.isfinite(losses[0]) and losses[-1] < 1e-6
    assert (sparsemax(encoder(x)).argmax(-1) == labels).all()
