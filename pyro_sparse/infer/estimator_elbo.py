"""ELBOs trained by score-function estimators, with a baseline or better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.poutine.util import prune_subsample_sites
from pyro.util import warn_if_nan
from torch import Tensor, nn

from pyro_sparse._autograd import differentiable_once
from pyro_sparse.estimators import Estimator
from pyro_sparse.infer.assignment import Assignment, asking_for_particles
from pyro_sparse.infer.elbo_module import EstimatorELBOModule
from pyro_sparse.infer.expansion.choice import Choice
from pyro_sparse.infer.expansion.estimator_messenger import lists_by
from pyro_sparse.infer.expansion.stats import StepRecord, SupportStats
from pyro_sparse.infer.names import check_names
from pyro_sparse.infer.processes import Means
from pyro_sparse.infer.pyro_internals import PARTICLES, buffers_kept, no_new_parameters
from pyro_sparse.infer.refusals import TWICE, refuse_guide_messenger, smooth_sites
from pyro_sparse.infer.runs.explanations import Alone, Several, explained, require_row_by_row
from pyro_sparse.infer.runs.on_rows import Compared
from pyro_sparse.infer.runs.ordinary import guess_nesting
from pyro_sparse.infer.runs.program import Program
from pyro_sparse.infer.runs.sequential import sequential_runs
from pyro_sparse.infer.runs.together import evaluated
from pyro_sparse.infer.runs.traces import Traces
from pyro_sparse.infer.runs.undisturbed import buffers_as_they_were, undisturbed
from pyro_sparse.infer.terms.bound import importance_bound
from pyro_sparse.infer.terms.masked import MaskedRows
from pyro_sparse.infer.terms.reading import Reader
from pyro_sparse.infer.terms.scores import Run
from pyro_sparse.infer.terms.surrogate import Surrogates, Update

COSTS = ("plates", "graph")


class EstimatorELBO(ELBO, nn.Module):
    r"""
    .. math:: \nabla\,\mathrm{ELBO} = E_q\bigl[\nabla f\bigr] + \sum_i E_q\bigl[(f_i - b_i)\,\nabla \log q(z_i)\bigr],
        \qquad f = \log p(x, z) - \log q(z)

    where :math:`f_i` are the terms of the site's own plate elements (and of those outside its plates), unscaled, and
    the estimator of site i says which values are drawn, with which weights, and what stands for :math:`b_i`. Sites
    with a reparameterised gradient keep it.

    Which estimator serves a site: ``infer["estimator"]``; else the entry for its name; else Pyro's own
    ``infer["baseline"]``; else ``"*"``; else the plain score function. A site with ``infer["enumerate"]`` is
    enumerated. An estimator with parameters or buffers that serves several sites serves the first itself, and a copy of
    it each other. Those of sites that are named here are there at once, and of ``"*"`` the first: torch optimisers may
    be made before the first run. Where ``"*"`` serves several, or the guide's ``infer`` gives one, make them after it;
    :meth:`__call__` raises, once, if an optimiser leaves such a parameter out. Sites ``z_0``, ``z_1``, ... in a
    sequential plate share one, by the name ``"z_*"``; layers or time steps with such names outside of one do not.

    A factor or an observed site of the guide with ``has_rsample=False`` is the log-density of what the guide drew
    outside of its sample statements, if its value depends on such a draw (dropout apart): then it has a score function,
    with the baseline that its name or ``"*"`` is given. Else it is a cost with a derivative of its own. A cost that
    depends on noise, such as a loss on augmented data, is to say ``has_rsample=True``.

    Sites that only the model has are summed out where ``infer={"enumerate": "parallel"}`` says so. Masked rows of a
    sparse site with ``Exact`` take one outcome, unless a term that is not masked depends on them. Under Pyro's
    validation the first run on several values at once is compared with runs on each. :attr:`last_stats` says what the
    last step's supports and model rows were.

    ``torch.compile`` and ``torch.autocast`` as for :class:`~pyro_sparse.infer.SparseEnumELBO`; with ``costs="graph"``
    compiled networks run eagerly, and ``REBAR`` that learns needs networks that can be differentiated twice. On a GPU
    the host waits at each step for the loss, and for what the estimators say; with ``Exact`` at a sparse site for the
    size of its supports, in ``"packed"`` for the number of rows too. ``elbo.to(device)`` takes what estimators learn
    there; from the CPU, where it begins, it is brought at each step.

    **Bias:** that of the estimators: none for all of :mod:`pyro_sparse.estimators` (``VIMCO``: for its own bound) but
    ``StraightThrough``.
    **Extra model evaluations:** those of the estimators. **Needs from the guide:** what the estimators need.
    **Second derivatives** of ``differentiable_loss``: right where no estimator draws (``Exact``; ``RaoBlackwell`` or
    ``UnorderedSet`` of all outcomes), else an error, wherever the gradient is differentiated.

    Args:
        estimator: one :class:`~pyro_sparse.estimators.Estimator` for all sites, or ``{"site": e, "*": e}``.
        analytic_kl: uses closed-form KL divergences where torch has them; at sites with ``StraightThrough`` they are
            used in any case. They are taken only where the same scale and mask lie on both sites; elsewhere both are
            drawn. A KL stays in the cost of the sites before it. Where the model draws its sites in another order than
            the guide, a further run at each step looks for priors that depend on their own site, through what the guide
            draws after it: those have none.
        costs: ``"plates"``: a site's cost is every term of its plate elements, always right. ``"graph"``: only the
            terms that depend on its draw. At each step the operations of the program are watched for that, which takes
            time: about half of what :class:`~pyro.infer.TraceGraph_ELBO` takes, several times that of ``"plates"``.
            What other threads compute is not seen, nor what ``torch.Tensor([z])`` takes from a list, as
            ``torch.tensor`` does.
        kwargs: every keyword of :class:`pyro.infer.ELBO` but ``jit_options``.

    Raises:
        ValueError: naming the site, for entries of sites that the guide lacks (but for discrete ones that the model
            observes in the first batch, which may be latent in others: a warning) or that are reparameterised, two
            mechanisms at one site, estimators with different numbers of particles, an estimator that the site's
            distribution, a Python branch or a model that takes indices rules out; all before gradients, parameters or
            running means change.

    Reference: J. Schulman et al., *Gradient estimation using stochastic computation graphs*, NeurIPS 2015, §3; each
    estimator names its own.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.distributions import SparseCategorical
        >>> from pyro_sparse.estimators import Exact, LeaveOneOut
        >>> def model(scores=torch.zeros(3)):
        ...     z, w = pyro.sample("z", dist.Categorical(logits=scores)), pyro.sample("w", dist.Poisson(2.0))
        ...     pyro.sample("x", dist.Normal(0.5 * z + w, 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     pyro.sample("z", SparseCategorical(pyro.param("scores", torch.tensor([-2.0, 0.1, 0.3]))))
        ...     pyro.sample("w", dist.Poisson(pyro.param("rate", torch.tensor(1.5))))
        >>> elbo = EstimatorELBO({"z": Exact(), "*": LeaveOneOut(4)}, analytic_kl=True)  # Poisson has one
        >>> loss = elbo.loss_and_grads(model, guide)
        >>> elbo.last_stats.sites  # mean and largest support of z, which has three outcomes
        {'z': (2.0, 2)}
    """

    def __init__(
        self,
        estimator: Estimator | Mapping[str, Any],
        *,
        analytic_kl: bool = False,
        costs: str = "plates",
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        if costs not in COSTS:
            raise ValueError(f"EstimatorELBO: expected costs in {COSTS}, got {costs!r}. Use one of them.")
        if kwargs.get("jit_options") is not None:
            raise ValueError("EstimatorELBO: expected no jit_options, got some. Run it eagerly: values are drawn anew.")
        self.assignment = Assignment(estimator)
        bounds = [type(e).__name__ for e in self.assignment.entries.values() if e.objective == "bound"]
        if bounds and isinstance(estimator, Mapping):
            raise ValueError(
                f"EstimatorELBO: expected {bounds[0]} alone, got it in a dict. It is the whole ELBO: pass it alone."
            )
        self.analytic_kl = analytic_kl
        self.costs = costs
        self._joint = False  # whether particles are run one by one but estimated together
        self._ready = False
        self._rows_compared = Compared()
        self._compared = False  # whether the program was the same on several values at once as on each alone
        self._rows = MaskedRows()
        self._choice = Choice()  # for sites with Exact("auto")
        self._choosing = False  # whether there are such sites, of which nothing was counted yet
        self._record: StepRecord | None = None
        self._means = Means()
        self._within: set[frozenset[str]] = set()  # as in SparseEnumELBO
        self._sequential = False  # whether infer asked for sequential enumeration so far: saves a run
        ELBO.__init__(self, **kwargs)
        if analytic_kl and bounds:
            raise ValueError(
                f"EstimatorELBO: expected no analytic_kl with {bounds[0]}, got it. Its weights need log-probs."
            )
        self._set_particles(self.assignment.entries)

    @property
    def last_stats(self) -> SupportStats | None:
        """
        Supports of the sparse sites with ``Exact``, and model rows, of the last step, as
        :attr:`SparseEnumELBO.last_stats`; None before the first. Reading it synchronises with the device.
        """
        return None if self._record is None else self._record.summary()

    @property
    def _bound(self) -> Estimator | None:
        """That whose n-particle bound is the loss."""
        entry = self.assignment.entries.get("*")
        return entry if entry is not None and entry.objective == "bound" else None

    def _set_particles(self, estimators: Mapping[str, Estimator]) -> None:
        """Takes the number of particles that the estimators ask for."""
        if (asking := asking_for_particles(estimators)) is None:
            return
        name, estimator = asking
        number, vectorized = estimator.num_particles, estimator.vectorized
        own = (vectorized and self.vectorize_particles) or self._joint
        if self.num_particles == number and own:
            return
        if self.num_particles != 1:
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected num_particles left out, got {self.num_particles} beside "
                f"{type(estimator).__name__}({number}), which draws its own particles. Leave it out."
            )
        self.num_particles = number
        self.vectorize_particles = vectorized
        self._joint = not vectorized
        self.max_plate_nesting += int(vectorized)

    def __call__(self, model: Any, guide: Any) -> EstimatorELBOModule:
        """A module that computes the loss, to be trained by torch optimisers; see :class:`pyro.infer.ELBO`."""
        return EstimatorELBOModule(model, guide, self)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("EstimatorELBO: expected loss, loss_and_grads or the like, got _get_trace.")

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """An estimate of the negative ELBO (or bound), by as many particles as a gradient takes."""
        loss = sum(torch_item(self._group_loss(group)) for group in self._groups(model, guide, args, kwargs))
        warn_if_nan(loss, "loss")
        return loss

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with the estimated gradient. Running means move if gradients are enabled and in training mode."""
        losses, updates = [], []
        with buffers_kept():  # an estimator may differentiate the model, before the loss is
            for group in self._groups(model, guide, args, kwargs):
                surrogate, own_updates = self._surrogate(group, model, guide, args, kwargs)
                if surrogate.requires_grad and not all(run.exact for run in group):
                    surrogate = differentiable_once(surrogate, TWICE)
                losses.append(self._group_loss(group) + (surrogate - surrogate.detach()))
                updates += own_updates
        loss = sum(losses[1:], losses[0])
        warn_if_nan(loss, "loss")
        if torch.is_grad_enabled() and self.training:
            self._update(updates)
        return loss

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss; adds the gradient to ``.grad``, registers the estimators' parameters, moves their running means."""
        loss, updates = 0.0, []
        with buffers_kept():  # an estimator may differentiate the model, before the loss is
            for group in self._groups(model, guide, args, kwargs):
                surrogate, own_updates = self._surrogate(group, model, guide, args, kwargs)
                self.assignment.register()
                loss += torch_item(self._group_loss(group))
                if surrogate.requires_grad:
                    surrogate.backward(retain_graph=self.retain_graph)
                updates += own_updates
        self._update(updates)
        warn_if_nan(loss, "loss")  # type: ignore[call-overload]
        return loss

    def _update(self, updates: list[Update]) -> None:
        if updates:
            self._means.moved("EstimatorELBO", self.buffers())
        with torch.no_grad():
            for update in updates:
                update()

    # Runs

    def _groups(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[list[Run]]:
        """The runs of each particle; of all particles where an estimator compares runs that are not vectorised."""
        refuse_guide_messenger("EstimatorELBO", guide)
        if not self._ready:
            self._prepare(model, guide, args, kwargs)
        if self._choosing:
            self._count_work(model, guide, args, kwargs)
        self._record = StepRecord()
        particles = 1 if self.vectorize_particles else self.num_particles
        if self._joint:
            runs: list[Run] = []
            for _ in range(particles):  # on one subsample: costs of other data would be no baseline
                subsamples = runs[0].traces.subsamples if runs else None
                runs += self._particle(model, guide, args, kwargs, subsamples=subsamples)
            yield runs
        else:
            for _ in range(particles):
                runs = list(self._particle(model, guide, args, kwargs))
                expansion = runs[0].traces.expansion
                if expansion.estimators and (expansion.num_laid_out or self._in_a_plate):
                    self._check_rows(expansion.estimators, Alone(model, guide, args, kwargs))
                yield runs
        if self._choice.uncounted:
            self._count_work(model, guide, args, kwargs)

    def _count_work(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        """Counts what the slots of sites with ``Exact("auto")`` cost, in runs that leave no trace."""
        program, self._choosing = self._program(model, guide, args, kwargs), False
        with undisturbed(), poutine.block(), evaluated():
            self._choice.count(program.sites_of_probe, int(self.max_plate_nesting))

    @property
    def _in_a_plate(self) -> bool:
        """Whether there is a plate of particles."""
        return bool(self.vectorize_particles and self.num_particles > 1)

    def _check_rows(self, estimators: Mapping[str, Estimator | None], alone: Alone) -> None:
        """Raises, at the first run on several values, if the program mixes them."""
        on_rows = lists_by(estimators, "packed")  # compared by themselves
        if is_validation_enabled() and not self._compared and not on_rows:
            require_row_by_row(alone, Several.of(estimators, self._in_a_plate))
            self._compared = True

    def _prepare(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        """Learns the plates and sites of a program, from a run that leaves no trace."""
        with no_new_parameters(), undisturbed():
            with poutine.block():
                trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
            found = {name: self.assignment.find(trace.nodes[name]) for name in trace.stochastic_nodes}
            with poutine.block():
                rest = poutine.trace(poutine.replay(model, trace=trace))
                check_names(self.assignment.unknown, trace, found, lambda: rest.get_trace(*args, **kwargs))
            self._set_particles({name: e for name, e in found.items() if e is not None})
            slots = any(e is not None and e.draws_slots for e in found.values())
            if self.max_plate_nesting == float("inf") and (slots or self.vectorize_particles):
                served = {name: e for name, e in found.items() if e is not None}
                with explained(Alone(model, guide, args, kwargs), lambda: None, lambda: smooth_sites(trace, served)):
                    guess_nesting(self, model, guide, args, kwargs, on_rows=lists_by(served, "packed"))
            if found and (slots or self._in_a_plate):
                self._check_rows(found, Alone(model, guide, args, kwargs))
        self.assignment.serve()
        self._choosing = lists_by(found, "auto")
        self._ready = True

    def _program(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Program:
        def count_plates() -> float:
            with undisturbed():
                guess_nesting(self, model, guide, args, kwargs, on_rows=lists_by(self.assignment.entries, "packed"))
            return self.max_plate_nesting

        alone = Alone(model, guide, args, kwargs)
        own_model, own_guide = model, guide
        if self._in_a_plate:  # whose plates have been counted
            particles = pyro.plate(PARTICLES, self.num_particles, dim=self._particle_dim)
            own_guide, own_model = particles(guide), particles(model)
        find, nesting, watched = self.assignment.find, self.max_plate_nesting, self.costs == "graph"
        chosen = self._rows_compared, self._choice, self.analytic_kl, self._within
        return Program(own_model, own_guide, args, kwargs, find, count_plates, nesting, alone, watched, *chosen)

    def _particle(
        self,
        model: Any,
        guide: Any,
        args: Any,
        kwargs: Any,
        kind: str = "draw",
        subsamples: Mapping[str, Tensor] | None = None,
    ) -> Iterator[Run]:
        """One run, or one for each outcome of the sites enumerated sequentially."""
        program = self._program(model, guide, args, kwargs)
        reader = Reader(self.assignment.find, self.assignment.find_for_score, self.analytic_kl)

        def run(wrap: Callable[[Any], Any] | None = None) -> Run:
            traces, kls = self._run_once_or_again(program, reader, kind, subsamples, wrap)
            result = reader.read(traces, kls)
            self.assignment.serve()
            if kind == "draw" and self._record is not None:
                self._record.add(traces.expansion.sites, traces.model, traces.guide, traces.ran_on, self._choice.taken)
            return result

        if not self._sequential:
            once = run()
            if not once.traces.has_sequential:
                yield once
                return
            self._sequential = True  # that run drew what is to be enumerated: it does not count
        yield from sequential_runs(run)

    def _run_once_or_again(
        self, program: Program, reader: Reader, kind: str, subsamples: Any, wrap: Any
    ) -> tuple[Traces, dict[str, Tensor]]:
        """A run and its closed-form divergences; done again if masked rows that it left out do matter."""
        while True:
            whole = self._rows.whole if wrap is None else None  # of a run for one outcome of others there is no second
            with self._rows.around(whole is not None) as put_back:
                traces = program.run(kind, subsamples, wrap, whole)
                kls = reader.divergences(traces)
                if whole is None or not self._rows.found(traces.expansion, [(traces.guide, traces.model)], kls):
                    return traces, kls
                put_back()

    # Estimates

    def _group_loss(self, group: list[Run]) -> Tensor:
        if self._bound is not None:
            return -importance_bound(self._bound, group[0], self._particle_dim)[0]
        elbos = [run.weighted(run.elbo()) for run in group]
        total = -sum(elbos[1:], elbos[0])
        return total if self.num_particles == 1 else total / self.num_particles

    @property
    def _particle_dim(self) -> int:
        return -int(self.max_plate_nesting)

    def _surrogate(
        self, group: list[Run], model: Any, guide: Any, args: Any, kwargs: Any
    ) -> tuple[Tensor, list[Update]]:
        """The surrogate loss of a group, and what moves the running means afterwards."""
        if self._bound is not None:
            return -importance_bound(self._bound, group[0], self._particle_dim)[1], []
        reruns: dict[str, list[Run]] = {}

        def rerun(kind: str) -> list[Run]:
            if kind not in reruns:
                with torch.no_grad(), buffers_as_they_were():
                    reruns[kind] = list(self._particle(model, guide, args, kwargs, kind, group[0].traces.subsamples))
            return reruns[kind]

        particle_dim = self._particle_dim if self._in_a_plate else 0
        surrogates = Surrogates(self.assignment.of, self.num_particles, self._joint, particle_dim)
        return surrogates.of_group(group, rerun)
