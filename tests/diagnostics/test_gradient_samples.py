"""Which parameters the report counts, and what it takes for time."""

from __future__ import annotations

import time
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_sparse.diagnostics import gradient_report
from pyro_sparse.diagnostics.gradient_samples import Program, _milliseconds
from pyro_sparse.infer import EstimatorELBO

X = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)[:, None]


class Learned:
    """Pyro's idiom of a learned baseline: a network of the guide's, trained by the loss on its own error."""

    def __init__(self, as_module: bool) -> None:
        self.encoder, self.decoder, self.baseline = nn.Linear(1, 3), nn.Linear(3, 1), nn.Linear(1, 1)
        self.as_module = as_module

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder), pyro.module("baseline", self.baseline)
        value = {"baseline_value": self.baseline(x).squeeze(-1)}
        network = {"nn_baseline": lambda x: self.baseline(x).squeeze(-1), "nn_baseline_input": x}
        with pyro.plate("data", len(x)):
            logits = self.encoder(x)
            infer = {"baseline": network if self.as_module else value}
            pyro.sample("z", dist.OneHotCategorical(logits=logits), infer=infer)


@pytest.mark.parametrize("as_module", [False, True])
def test_the_parameters_of_a_baseline_are_none_of_the_elbos(as_module: bool) -> None:
    """The control: with them, which is what was counted before, an unbiased estimator seems to be far off."""
    learned = Learned(as_module)
    elbo = EstimatorELBO({}) if as_module else TraceGraph_ELBO()
    given: dict[str, Any] = {"estimators": {"with baseline": elbo}, "num_samples": 16}
    got = gradient_report(learned.model, learned.guide, (X,), **given)
    assert (got.num_parameters, got.chosen) == (6, False)
    assert got.estimators["with baseline"].unbiased
    wrong = gradient_report(learned.model, learned.guide, (X,), parameters=["encoder", "baseline"], **given)
    assert (wrong.num_parameters, wrong.chosen) == (8, True)
    assert wrong.estimators["with baseline"].unbiased is False
    assert "Gradient with respect to 8 chosen parameters" in str(wrong)
    assert "biased, against its construction" in str(wrong)


def test_what_only_a_baseline_uses_is_put_back() -> None:
    value = torch.tensor(0.3, requires_grad=True)  # in no store and in no module

    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.5))

    def guide() -> None:
        infer = {"baseline": {"baseline_value": value}}
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", torch.tensor(0.3))), infer=infer)

    got = gradient_report(model, guide, estimators={"graph": TraceGraph_ELBO()}, num_samples=4)
    assert got.num_parameters == 1 and value.grad is None


def look(model: Any, guide: Any, given: Any = None) -> Program:
    program = Program(model, guide, (), {}, given)
    program.look()
    return program


def test_parameters_of_the_guide_are_found_in_every_branch_and_through_draws() -> None:
    def model() -> None:
        u = pyro.sample("u", dist.Normal(pyro.param("prior", torch.tensor(0.0)), 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(u + z, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.param("unused", torch.tensor(1.0))
        pyro.sample("u", dist.Delta(pyro.param("point", torch.tensor(0.5))))
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.2))))
        loc = pyro.param("one", torch.tensor(0.5)) if z else pyro.param("zero", torch.tensor(-0.5))
        pyro.sample("v", dist.Normal(loc, pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)))

    program = look(model, guide)
    store = pyro.get_param_store()._params
    names = {name for name, p in store.items() if any(p is q for q in program.parameters)}
    assert names == {"point", "logit", "one", "zero", "scale"}
    assert {id(p) for p in program.leaves} == {id(p) for p in store.values()}


class Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.spare = nn.Parameter(torch.tensor(0.5)), nn.Linear(1, 1)

    def forward(self) -> None:
        pyro.sample("u", dist.Normal(self.loc, 1.0))


def normal() -> None:
    pyro.sample("u", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))


def test_parameters_by_name_and_by_tensor() -> None:
    guide = Guide()
    assert [p is guide.loc for p in look(normal, guide).parameters] == [True]
    assert {id(p) for p in look(normal, guide, ["spare"]).parameters} == {id(p) for p in guide.spare.parameters()}
    mean = pyro.get_param_store()._params["mean"]
    assert [id(p) for p in look(normal, guide, ["mean", guide.loc, "loc"]).parameters] == [id(mean), id(guide.loc)]
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    assert [id(p) for p in look(normal, guide, [scale]).parameters] == [id(pyro.get_param_store()._params["scale"])]
    with pytest.raises(ValueError, match=r"expected parameters among \['loc', 'mean', .*, got 'me'\. Correct"):
        look(normal, guide, ["me"])
    with pytest.raises(ValueError, match=r"expected parameters that are leaf tensors .*, got one of shape \(1,\)"):
        look(normal, guide, [guide.spare(torch.zeros(1))])
    with pytest.raises(ValueError, match="expected parameters, got an empty collection"):
        look(normal, guide, [])


def test_parameters_of_the_model_may_be_asked_for() -> None:
    got = gradient_report(normal, Guide(), estimators={"drawn": Trace_ELBO()}, num_samples=8, parameters=["mean"])
    assert got.num_parameters == 1 and got.estimators["drawn"].unbiased


class Waits(Trace_ELBO):
    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return super().loss_and_grads(*args, **kwargs)


def test_time_is_the_processors() -> None:
    """A wait, as for other programs on the machine, does not count; a wall clock would see 50 ms."""
    got = gradient_report(normal, Guide(), estimators={"waits": Waits()}, num_samples=4)
    assert 0 < got.estimators["waits"].milliseconds < 40


def test_time_on_a_gpu_is_that_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            done.append(f"record on {stream}")

        def synchronize(self) -> None:
            done.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert _milliseconds(lambda: done.append("run"), torch.device("cuda:1")) == 7.0
    assert done == ["record on stream of cuda:1", "run", "record on stream of cuda:1", "synchronize"]
