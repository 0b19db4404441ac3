"""The reference trusts no class: what is measured against is drawn or summed without the library's own estimators."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO

from pyro_sparse.diagnostics import gradient_report
from pyro_sparse.estimators import Exact, LeaveOneOut
from pyro_sparse.infer import EstimatorELBO


def faulty(elbo: Any) -> Any:
    """The same ELBO, of the same class, with a fault: twice the gradient."""

    def loss_and_grads(*args: Any, **kwargs: Any) -> Any:
        loss = 2 * type(elbo).differentiable_loss(elbo, *args, **kwargs)
        loss.backward()
        return float(loss.detach())

    elbo.loss_and_grads = loss_and_grads
    return elbo


def model() -> None:
    u = pyro.sample("u", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(u, 0.1), obs=torch.tensor(2.0))


def guide() -> None:
    pyro.sample("u", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.1))


def test_a_fault_in_the_most_precise_is_its_own() -> None:
    """The control: with the most precise of the trusted classes as the reference it is all others that are biased."""
    estimators = {"many": faulty(EstimatorELBO({}, num_particles=4)), "one": Trace_ELBO()}
    got = gradient_report(model, guide, estimators=estimators, num_samples=24)
    assert got.reference.startswith("the mean of 20 plain gradients")
    assert [row.unbiased for row in got.estimators.values()] == [False, True]
    assert got.recommended == "one" and "biased, against its construction" in str(got)
    wrong = gradient_report(model, guide, estimators=estimators, num_samples=24, reference="many")
    assert [row.unbiased for row in wrong.estimators.values()] == [True, False]


def chain(last: int) -> tuple[Any, Any]:
    """z1 -> z2 -> z3, the last of them with many outcomes."""
    torch.manual_seed(1)
    first, second, third = (torch.randn(*shape, requires_grad=True) for shape in ((3,), (3, 3), (3, last)))
    weights = torch.randn(last)

    def guide() -> None:
        z1 = pyro.sample("z1", dist.Categorical(logits=first))
        z2 = pyro.sample("z2", dist.Categorical(logits=second[z1]))
        pyro.sample("z3", dist.Categorical(logits=third[z2]))

    def model() -> None:
        for name, size in (("z1", 3), ("z2", 3), ("z3", last)):
            z = pyro.sample(name, dist.Categorical(logits=torch.zeros(size)))
        pyro.sample("x", dist.Normal(weights[z], 0.3), obs=torch.tensor(0.5))

    return model, guide


def test_exact_is_checked_like_all_others() -> None:
    """On a chain that is enumerated, and on one that has too many outcomes for it."""
    for last, reference in ((3, "exact enumeration"), (500, "the mean of 20 plain gradients")):
        program = chain(last)
        elbo = EstimatorELBO({"*": Exact(), "z3": LeaveOneOut(2)}, max_plate_nesting=0)
        elbo.differentiable_loss = lambda *a, elbo=elbo: 3 * EstimatorELBO.differentiable_loss(elbo, *a)
        estimators = {"faulty": elbo, "score": Trace_ELBO(max_plate_nesting=0)}
        got = gradient_report(*program, estimators=estimators, num_samples=20)
        assert got.reference.startswith(reference)
        assert (got.estimators["score"].unbiased, got.estimators["faulty"].by_construction) == (True, True)
        assert got.recommended == "score" or got.estimators["faulty"].unbiased
