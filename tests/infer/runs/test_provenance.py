"""What is seen of the ways in which a tensor comes to depend on a draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceGraph_ELBO
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_sparse.estimators import Exact, LeaveOneOut, ScoreFunction
from pyro_sparse.infer import BaselineELBO, EstimatorELBO
from pyro_sparse.infer.runs.provenance import Provenance
from pyro_sparse.testing.outcomes import outcomes

Z = frozenset({"z"})


def in_place(z: Tensor) -> Tensor:
    out = torch.zeros(3)
    out[1] = z
    return out


def given_out(z: Tensor) -> Tensor:
    out = torch.zeros(())
    torch.add(z, 1.0, out=out)
    return out


def branch(z: Tensor) -> Tensor:
    return torch.ones(2) * (2.0 if z > 0.5 else 3.0)


def selected(z: Tensor) -> Tensor:
    return torch.ones(len(torch.ones(3)[z.expand(3) > 0.5]))


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "arithmetic": lambda z: 2.0 * z + 1.0,
    "view": lambda z: z.expand(3)[1:],
    "index": lambda z: torch.arange(3.0)[z.long().reshape(1)],
    "element": lambda z: torch.arange(3.0)[z.long()],
    "in place": in_place,
    "out": given_out,
    "vmap": lambda z: torch.func.vmap(lambda row: row * z)(torch.ones(3, 2)),
    "item": lambda z: torch.ones(2) * z.item(),
    "float": lambda z: torch.ones(2) * float(z),
    "tolist": lambda z: torch.tensor(z.tolist()),
    "numpy": lambda z: torch.as_tensor(z.numpy()) + 0.0,
    "branch": branch,
    "equal": lambda z: torch.ones(2) * torch.equal(z, torch.ones(())),
    "length": selected,
    "list": lambda z: torch.tensor([z, 2 * z]),
    "new": lambda z: torch.ones(1).new_tensor([z, z]),
    "cond": lambda z: torch.cond(z > 0.5, lambda z: 2 * z, lambda z: 0 * z, (z,)),
    "scripted": lambda z: torch.jit.script(branch)(z),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_dependence_is_found(way: str) -> None:
    if way == "cond" and not hasattr(TorchDispatchMode, "supports_higher_order_operators"):
        pytest.skip("this torch, as 2.7, runs torch.cond under no mode but its own, and says so")
    provenance = Provenance()
    with provenance.watching():
        z = torch.tensor(1.0).clone()
        provenance.mark(z, Z)
        assert provenance.of(WAYS[way](z)) == Z
        assert provenance.of(z) == Z


@pytest.mark.parametrize("way", ["arithmetic", "view", "index", "element", "in place", "vmap"])
def test_what_does_not_depend_is_not_found(way: str) -> None:
    """Nor what is made afterwards, or a table of which an element was taken."""
    provenance, table = Provenance(), torch.arange(3.0)
    with provenance.watching():
        z = torch.tensor(1.0).clone()
        provenance.mark(z, Z)
        WAYS[way](z)
        assert provenance.of(table[z.long()]) == Z
        assert not provenance.of(table)
        dist.Bernoulli(z, validate_args=True)  # which looks at z, to check it
        assert not provenance.of(torch.ones(2) * 3.0)


def test_random_numbers_of_the_programs_own() -> None:
    provenance = Provenance(own_draws=True)
    with provenance.watching():
        assert provenance.of(torch.randn(3) * 2.0)
        assert provenance.of(torch.distributions.Categorical(torch.ones(3)).sample())
        assert not provenance.of(torch.nn.functional.dropout(torch.ones(5)))
        assert not provenance.of(torch.ones(3))


def program(use: Callable[[Tensor], Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two bits that do not see each other, with a datum each."""

    def model() -> None:
        for i in range(2):
            z = pyro.sample(f"z{i}", dist.Bernoulli(0.3))
            pyro.sample(f"x{i}", dist.Normal(10.0 * i + use(z), 1.0), obs=torch.tensor(3.0 * i))

    def guide() -> None:
        for i in range(2):
            pyro.sample(f"z{i}", dist.Bernoulli(logits=pyro.param(f"a{i}", torch.tensor(0.3))))

    return model, guide


def gradients(elbo: Any, model: Any, guide: Any, *args: Any, seed: int | None = 0) -> list[Tensor]:
    if seed is not None:
        pyro.set_rng_seed(seed)
    elbo.loss_and_grads(model, guide, *args)
    found = []
    for _, parameter in sorted(pyro.get_param_store().named_parameters()):
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
        parameter.grad = None
    return found


def test_elements_of_tables_leave_graph_costs_fine() -> None:
    """A scalar that takes an element of a table is no escape: the gradient is TraceGraph_ELBO's at the same draws."""
    table = torch.tensor([0.5, -1.0])
    model, guide = program(lambda z: table[z.long()])
    for seed in range(5):
        expected = gradients(TraceGraph_ELBO(), model, guide, seed=seed)
        got = gradients(BaselineELBO(costs="graph"), model, guide, seed=seed)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("way", ["item", "branch", "in place", "tolist", "element"])
def test_graph_costs_are_right_where_values_leave_torch(way: str) -> None:
    """By enumeration: with every cost that may depend on a draw, the mean gradient is the exact one."""
    model, guide = program(lambda z: WAYS[way](z).sum())
    q = torch.tensor(0.3, requires_grad=True)
    p, total = q.sigmoid(), torch.zeros(())
    for bits in torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0)):
        f = sum(
            dist.Normal(10.0 * i + WAYS[way](z).sum(), 1.0).log_prob(torch.tensor(3.0 * i)) for i, z in enumerate(bits)
        )
        q0 = dist.Bernoulli(p).log_prob(bits).sum()
        total = total + q0.exp() * (f + dist.Bernoulli(0.3).log_prob(bits).sum() - q0)
    exact = torch.autograd.grad(-total, q)[0]
    elbo = BaselineELBO(costs="graph")
    gradients(elbo, model, guide)
    mean = sum(p * sum(g) for p, g in outcomes(lambda: gradients(elbo, model, guide, seed=None)))
    torch.testing.assert_close(mean, exact)


@pytest.mark.parametrize("analytic_kl", [False, True])
def test_a_flag_changes_what_depends_on_what(analytic_kl: bool) -> None:
    """What an earlier step found decides nothing."""

    def model(use: bool) -> None:
        with pyro.plate("N", 2):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            loc = torch.tensor([-1.0, 0.0, 2.0])[z] if use else torch.zeros(2)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([1.0, -1.0]))

    def guide(use: bool) -> None:
        with pyro.plate("N", 2):
            pyro.sample(
                "z", dist.Categorical(logits=pyro.param("s", torch.tensor([[0.0, 1.0, 0.5], [0.2, 0.0, -1.0]])))
            )

    results = {}
    for costs in ("plates", "graph"):
        elbo = EstimatorELBO(Exact(), costs=costs, analytic_kl=analytic_kl)
        results[costs] = [gradients(elbo, model, guide, use) for use in (False, True, False)]
    torch.testing.assert_close(results["graph"], results["plates"])


@pytest.mark.parametrize("second", [Exact(), LeaveOneOut(2)], ids=["Exact", "LeaveOneOut"])
def test_what_the_prior_depends_on_is_reached_by_the_divergence(second: Any) -> None:
    """A mean-field guide of a hierarchical prior."""
    pyro.set_rng_seed(0)
    table = torch.randn(3, 3)

    def guide() -> None:
        pyro.sample("z1", dist.Categorical(logits=pyro.param("q1", torch.tensor([0.3, -0.2, 0.1]))))
        pyro.sample("z2", dist.Categorical(logits=pyro.param("q2", torch.tensor([0.5, 0.1, -0.4]))))

    def model() -> None:
        z1 = pyro.sample("z1", dist.Categorical(logits=torch.zeros(3)))
        pyro.sample("z2", dist.Categorical(logits=table[z1]))

    costs = ("plates", "graph")
    elbos = [
        EstimatorELBO({"z1": Exact(), "z2": second}, analytic_kl=True, costs=c, max_plate_nesting=0) for c in costs
    ]
    plates, graph = (gradients(elbo, model, guide) for elbo in elbos)
    torch.testing.assert_close(graph[0], plates[0])


@pytest.mark.parametrize("mask", [False, torch.tensor(False)], ids=["bool", "tensor"])
def test_a_masked_site_between_two(mask: Any) -> None:
    """Its own log-probability does not tell of its parent; what is drawn does."""
    table, loc = torch.tensor([[0.0, 1.0], [1.0, -1.0]]), torch.tensor([-1.0, 2.0])

    def guide() -> None:
        z1 = pyro.sample("z1", dist.Categorical(logits=pyro.param("a", torch.tensor([0.3, -0.2]))))
        pyro.sample("z2", dist.Categorical(logits=table[z1]).mask(mask))

    def model() -> None:
        pyro.sample("z1", dist.Categorical(torch.ones(2)))
        z2 = pyro.sample("z2", dist.Categorical(torch.ones(2)).mask(mask))
        pyro.sample("x", dist.Normal(loc[z2], 1.0), obs=torch.tensor(0.3))

    means = []
    for costs in ("plates", "graph"):
        elbo = EstimatorELBO({"z1": ScoreFunction(), "z2": Exact()}, costs=costs, max_plate_nesting=0)
        gradients(elbo, model, guide)
        runs = outcomes(lambda elbo=elbo: gradients(elbo, model, guide, seed=None))
        means.append(sum(p * g[0] for p, g in runs))
    torch.testing.assert_close(*means)
