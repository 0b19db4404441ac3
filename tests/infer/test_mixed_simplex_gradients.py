r"""
Gradients of programs with mixed latents on the simplex against quadrature over all seven faces of a triangle.

A z-test compares the mean of 6 * 10^4 draws with the exact gradient, in each of six parameters: the scores of the face
and the parameters of the point in it. The slow tests make about 200 such comparisons at 4 standard errors: with
everything right and seeds that are not fixed, one run in 80 would have a failure. Negative controls ask for 20 standard
errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_sparse import sample_mixed
from pyro_sparse.distributions import FaceDirichlet, FaceLogisticNormal, GibbsFaces, MixedDirichlet, MixedSimplex
from pyro_sparse.estimators import Exact, LeaveOneOut, MovingAverage, RaoBlackwell, ScoreFunction
from pyro_sparse.infer import BaselineELBO, EstimatorELBO, SparseEnumELBO
from tests.distributions.simplex.simplex_zoo import points
from tests.known_gradients import Program, estimates, exact_gradient, standard_errors

DRAWS, CHUNK = 60_000, 20_000
NOISE = 0.4
WEIGHTS = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
DATA = torch.tensor([0.6, -0.2, 0.4, 0.1], dtype=torch.float64)
START = torch.tensor([0.3, -0.6, 0.1, 0.7, 0.4, 1.1], dtype=torch.float64)  # three scores, three for the point
PRIOR = torch.tensor([-0.2, 0.1, 0.2, 0.5, 0.9, 0.6], dtype=torch.float64)


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def parts(kind: str, t: Tensor) -> tuple[Any, Any]:
    within = FaceDirichlet(t[..., 3:].exp()) if kind == "dirichlet" else FaceLogisticNormal(t[..., 3:], 0.9)
    return GibbsFaces(t[..., :3]), within


def mixed(kind: str, t: Tensor) -> MixedSimplex:
    return MixedSimplex(*parts(kind, t))


def theta(*shape: int) -> Tensor:
    return pyro.param("theta", lambda: START.expand(*shape, 6).clone())


def one_site(kind: str, n: int) -> Program:
    def model() -> None:
        with pyro.plate("copies", n):
            y = pyro.sample("y", mixed(kind, PRIOR))
            pyro.sample("x", dist.Normal(y @ WEIGHTS, NOISE), obs=DATA[0].expand(n))

    def guide() -> None:
        t = theta(n)
        with pyro.plate("copies", n):
            pyro.sample("y", mixed(kind, t))

    return model, guide


def two_sites(kind: str, n: int) -> Program:
    """The same by sample_mixed."""

    def model() -> None:
        with pyro.plate("copies", n):
            _, y = sample_mixed("y", *parts(kind, PRIOR))
            pyro.sample("x", dist.Normal(y @ WEIGHTS, NOISE), obs=DATA[0].expand(n))

    def guide() -> None:
        t = theta(n)
        with pyro.plate("copies", n):
            sample_mixed("y", *parts(kind, t))

    return model, guide


def wrapped(kind: str, n: int) -> Program:
    """Two elements, the second of which is masked, expanded and declared dependent; a mask in front and behind."""
    mask = torch.tensor([True, False])

    def dress(d: MixedSimplex) -> Any:
        return d.expand((n, 2)).mask(mask).to_event(1).mask(torch.ones(n, dtype=torch.bool))

    def model() -> None:
        with pyro.plate("copies", n):
            y = pyro.sample("y", dress(mixed(kind, PRIOR)))
            pyro.sample("x", dist.Normal(y[..., 0, :] @ WEIGHTS, NOISE), obs=DATA[0].expand(n))

    def guide() -> None:
        t = theta(n, 1)
        with pyro.plate("copies", n):
            pyro.sample("y", dress(mixed(kind, t)))

    return model, guide


def subsampled(kind: str, n: int) -> Program:
    """Local latents of four data, two of which are seen at a time, drawn at random: unbiased for all four."""

    def model() -> None:
        with pyro.plate("copies", n, dim=-2), pyro.plate("data", 4, subsample_size=2, dim=-1) as index:
            y = pyro.sample("y", mixed(kind, PRIOR))
            pyro.sample("x", dist.Normal(y @ WEIGHTS, NOISE), obs=DATA[index].expand(n, -1))

    def guide() -> None:
        t = theta(n, 1)
        with pyro.plate("copies", n, dim=-2), pyro.plate("data", 4, subsample_size=2, dim=-1):
            pyro.sample("y", mixed(kind, t))

    return model, guide


def gradient(kind: str, data: Tensor) -> Tensor:
    y, w = points(3, step=0.4, reach=40.0)
    y, w = y[w > 0], w[w > 0]

    def elbo(t: Tensor) -> Tensor:
        log_q, log_p = mixed(kind, t).log_prob(y), mixed(kind, PRIOR).log_prob(y)
        log_lik = sum(dist.Normal(y @ WEIGHTS, NOISE).log_prob(x) for x in data)
        return (w * log_q.exp() * (log_lik + len(data) * (log_p - log_q))).sum()

    return exact_gradient(elbo, START)


def mean_errors(make: Callable[[], ELBO], program: Callable[[int], Program], exact: Tensor, n: int = 1) -> Tensor:
    """How many standard errors the mean of the estimates is off, for each parameter."""
    elbo = make()
    estimates(elbo, program(64))  # teaches a running mean
    rows = torch.cat([estimates(elbo, program(CHUNK // n)).reshape(-1, 6) for _ in range(DRAWS // CHUNK)])
    return standard_errors(rows - exact)


ROUTES: dict[str, tuple[Callable[[], ELBO], int]] = {
    "Trace_ELBO": (Trace_ELBO, 1),
    "TraceGraph_ELBO": (TraceGraph_ELBO, 1),
    "SparseEnumELBO": (lambda: SparseEnumELBO(strict_enumeration_warning=False), 1),
    "moving average": (lambda: BaselineELBO(MovingAverage()), 1),
    "analytic KL": (lambda: BaselineELBO(analytic_kl=True), 1),
    "leave-one-out": (lambda: EstimatorELBO(LeaveOneOut(4)), 4),
    "graph": (lambda: EstimatorELBO(ScoreFunction(), costs="graph"), 1),
    "leave-one-out, analytic KL": (lambda: EstimatorELBO(LeaveOneOut(4), analytic_kl=True), 4),
}
FACE_ROUTES: dict[str, tuple[Callable[[], ELBO], int]] = {
    "Exact": (lambda: EstimatorELBO({"y_face": Exact()}), 1),
    "Exact, analytic KL": (lambda: EstimatorELBO({"y_face": Exact()}, analytic_kl=True), 1),
    "RaoBlackwell": (lambda: EstimatorELBO({"y_face": RaoBlackwell(k=3)}), 1),
}
KINDS = pytest.mark.parametrize("kind", ["dirichlet", "logistic normal"])


SITES = [(kind, route) for kind in ("dirichlet", "logistic normal") for route in ROUTES]
SITES.remove(("logistic normal", "leave-one-out, analytic KL"))  # half a minute; each alone is there


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "route"), SITES)
def test_one_site(kind: str, route: str) -> None:
    make, n = ROUTES[route]
    assert mean_errors(make, lambda m: one_site(kind, m), gradient(kind, DATA[:1]), n).max() < 4


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("route", [*ROUTES, *FACE_ROUTES])
def test_two_sites(kind: str, route: str) -> None:
    make, n = {**ROUTES, **FACE_ROUTES}[route]
    assert mean_errors(make, lambda m: two_sites(kind, m), gradient(kind, DATA[:1]), n).max() < 4


@pytest.mark.slow
@KINDS
def test_enumerated_faces(kind: str) -> None:
    def program(n: int) -> Program:
        model, guide = two_sites(kind, n)
        return model, config_enumerate(guide)

    errors = mean_errors(lambda: TraceEnum_ELBO(max_plate_nesting=1), program, gradient(kind, DATA[:1]))
    assert errors.max() < 4


@pytest.mark.slow
@pytest.mark.parametrize("route", ["Trace_ELBO", "TraceGraph_ELBO", "moving average", "analytic KL"])
def test_wrapped(route: str) -> None:
    exact = gradient("dirichlet", DATA[:1])
    assert mean_errors(ROUTES[route][0], lambda m: wrapped("dirichlet", m), exact).max() < 4


@pytest.mark.slow
@pytest.mark.parametrize("route", ["Trace_ELBO", "TraceGraph_ELBO", "moving average", "analytic KL"])
def test_subsampled(route: str) -> None:
    """A subsample is drawn once for each step: many steps with few copies."""
    elbo, rows = ROUTES[route][0](), []
    for _ in range(400):
        rows.append(estimates(elbo, subsampled("dirichlet", 100)).reshape(-1, 6).mean(0))
    errors = torch.stack(rows) - gradient("dirichlet", DATA)
    assert standard_errors(errors).max() < 4


class Reparameterised(MixedDirichlet):
    """What published code does: the face is drawn, and its gradient left out."""

    has_rsample = True

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self._stratified(self._extended_shape(torch.Size(sample_shape)))

    def score_parts(self, value: Tensor) -> Any:
        log_prob = self.log_prob(value)
        return dist.score_parts.ScoreParts(log_prob, 0, log_prob)


def test_a_reparameterised_face_never_learns() -> None:
    def program(n: int) -> Program:
        model, _ = one_site("dirichlet", n)

        def guide() -> None:
            t = theta(n)
            with pyro.plate("copies", n):
                pyro.sample("y", Reparameterised(t[:, :3], t[:, 3:].exp()))

        return model, guide

    errors = mean_errors(Trace_ELBO, program, gradient("dirichlet", DATA[:1]))
    assert errors[:3].max() > 20


def test_the_gradient_of_the_scores_and_that_of_the_point() -> None:
    """Each on its own, the other parameters held: one draw of 2e5, at 4.5 standard errors."""
    exact = gradient("dirichlet", DATA[:1])
    for held in (slice(0, 3), slice(3, 6)):
        free = [i for i in range(6) if i not in range(*held.indices(6))]

        def program(n: int, held: slice = held) -> Program:
            model, _ = one_site("dirichlet", n)

            def guide() -> None:
                t = theta(n)
                keep = torch.zeros(6, dtype=torch.bool)
                keep[held] = True
                with pyro.plate("copies", n):
                    pyro.sample("y", mixed("dirichlet", torch.where(keep, t.detach(), t)))

            return model, guide

        errors = mean_errors(Trace_ELBO, program, torch.where(torch.tensor([i in free for i in range(6)]), exact, 0.0))
        assert errors[free].max() < 4.5


def test_observed_compositions() -> None:
    """One observed site, whose loss is its log-density, zeros included."""
    y = mixed("dirichlet", PRIOR).sample(torch.Size([20]))
    t = START.clone().requires_grad_()

    def model() -> None:
        with pyro.plate("data", 20):
            face, value = sample_mixed("y", *parts("dirichlet", t), obs=y)
            assert value is y and torch.equal(face, (y > 0).double())

    loss = Trace_ELBO().differentiable_loss(model, lambda: None)
    torch.testing.assert_close(loss, -mixed("dirichlet", t).log_prob(y).sum())
    trace = pyro.poutine.trace(model).get_trace()
    assert [name for name in trace.observation_nodes if name != "data"] == ["y"]


def test_latent_sites() -> None:
    trace = pyro.poutine.trace(lambda: sample_mixed("y", *parts("dirichlet", START))).get_trace()
    assert list(trace.stochastic_nodes) == ["y_face", "y"]
    face, y = (trace.nodes[name]["value"] for name in ("y_face", "y"))
    assert torch.equal(face > 0, y > 0)
    assert trace.nodes["y"]["fn"].has_rsample and not trace.nodes["y_face"]["fn"].has_rsample


def test_errors_name_the_site() -> None:
    faces, within = parts("dirichlet", START)
    with pytest.raises(TypeError, match=r"sample_mixed, site 'y': expected within to be a family"):
        sample_mixed("y", faces, dist.Dirichlet(torch.ones(3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as many vertices in faces and within, got 4 and 3"):
        sample_mixed("y", GibbsFaces(torch.zeros(4)), within)

    def model() -> None:
        sample_mixed("y", faces, within, obs=torch.tensor([0.5, 0.4, 0.0]))

    with pytest.raises(ValueError, match=r"'y'|sum to one"):
        Trace_ELBO().loss(model, lambda: None)

    def latent() -> None:
        pyro.sample("y", mixed("dirichlet", START))

    with pytest.raises(NotImplementedError, match="never reaches an atom"):
        AutoNormal(latent)()
    with pytest.raises(NotImplementedError, match="fully reparameterized"):
        pyro.infer.TraceMeanField_ELBO().loss_and_grads(latent, latent)
