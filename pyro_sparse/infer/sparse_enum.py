"""The exact ELBO at the cost of the guide's non-zero support."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import TraceEnum_ELBO
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_sparse.estimators.base import Gather
from pyro_sparse.estimators.exact import MODES, check_expansion
from pyro_sparse.infer.discrete import marginals, posterior_run
from pyro_sparse.infer.elbo_module import LossModule
from pyro_sparse.infer.expansion import layouts
from pyro_sparse.infer.expansion.choice import Choice
from pyro_sparse.infer.expansion.masked_rows import MaskedRowsMessenger
from pyro_sparse.infer.expansion.messengers import SparseEnumMessenger, SparseSite
from pyro_sparse.infer.expansion.rows import Ran, Rows, rows_of
from pyro_sparse.infer.expansion.stats import StepRecord, SupportStats
from pyro_sparse.infer.pyro_internals import buffers_kept, dice_elbo, dice_expectation
from pyro_sparse.infer.refusals import refuse_guide_messenger
from pyro_sparse.infer.runs.enumerated import Pair, enumerated
from pyro_sparse.infer.runs.explanations import Alone, Several, explained, require_row_by_row
from pyro_sparse.infer.runs.on_rows import Compared, OnRows
from pyro_sparse.infer.runs.ordinary import guess_nesting
from pyro_sparse.infer.runs.sequential import sequential_runs
from pyro_sparse.infer.runs.together import evaluated
from pyro_sparse.infer.runs.undisturbed import buffers_as_they_were, undisturbed
from pyro_sparse.infer.runs.window import require_window
from pyro_sparse.infer.terms.factors import as_costs
from pyro_sparse.infer.terms.masked import MaskedRows

_NO_JIT = "Tracing would freeze the support of the first batch; run it eagerly."


class SparseEnumELBO(TraceEnum_ELBO):
    r"""
    .. math:: \mathrm{ELBO} = \sum_{z:\, q(z) > 0} q(z)\,\bigl(\log p(x, z) - \log q(z)\bigr)

    Terms with :math:`q(z) = 0` vanish from the ELBO, and from its gradient where the projection that made q is
    constant at zero, as sparsemax and entmax are. So the sum over the support is exact, and the model runs on
    :math:`S` outcomes per example where :class:`~pyro.infer.TraceEnum_ELBO` runs on all :math:`K`.

    Every guide site with a sparse support is enumerated, with no decorator. ``infer={"enumerate_support": "dense"}``
    asks for all K outcomes at a site; other sites behave as under ``TraceEnum_ELBO``. Model sites that the guide
    lacks are enumerated where ``infer={"enumerate": "parallel"}`` says so, sparsely if they can be. Masked rows of a
    guide site take one outcome, unless a term that is not masked depends on them. Under Pyro's validation the first run
    on several outcomes at once is compared with runs on each. :attr:`last_stats` says what the last step's supports,
    layouts and model rows were.

    In ``pyro.markov`` a site has the union of the supports that its parents give it, and may depend on enumerated sites
    within the window, ``history`` steps back, only: the dims of earlier ones are given to others. (Pyro does not look.)

    Networks may be compiled, with ``torch.compile(network, dynamic=True)``, since supports vary in size: a graph for
    each number of dims that values come in, at most 8 as torch counts. ``torch.autocast`` goes around a step, not
    around the loop of steps, whose weights it would keep: probabilities and sums are in float32 under it.

    On a GPU the host waits at each step for: how large the supports are (once per sparse site; ``"auto"``: up to four
    times), how many rows there are (``"packed"``), and whether a prior is zero (once per sparse site); a mask is looked
    at once, or twice. Beside that Pyro's sum waits three times for each group of terms, and the loss is read.

    **Bias:** none, in value and gradient. **Extra model evaluations:** none (``mode="auto"``: 1 + 2 per sparse site
    before the first step). **Needs from the guide:** a distribution with a sparse support, in a plate and not under
    ``to_event``.

    Args:
        mode: ``"padded"``: each example its own support, padded to the largest in the batch, S·B model rows.
            ``"union"``: all examples share the union of their supports: less where the decoder sees nothing but the
            outcome. ``"packed"``: the model runs on one row per example and joint outcome of positive probability, N
            in all: less where supports differ in size. Its data plate then has N elements, so it must take its size
            and its data from arguments (a tensor whose leading size is the plate's is given a row for each of N), or
            by the plate's indices, and no row may see another. ``"auto"``: at each step and site whichever of those
            and of dense enumeration costs least, by the work that a slot was counted to cost in a batch of about this
            size. That count, before the first step and after the first one of another size, runs the model under
            ``no_grad`` and leaves the random number generators as they were; so does a comparison of packed rows with
            an ordinary run, before they are first chosen.
        max_support: refuse a batch in which one example's support is larger.
        chunk_rows: in mode ``"packed"``: the model runs on so many rows at a time, and again in the backward pass, so
            that memory is that of one part. With 1 it may branch in Python on the value. What the model reads, weights
            and data, must stay as it is until then.
        gather: in modes ``"packed"`` and ``"auto"``: places arguments that the rule does not, such as lists of one
            entry per example: ``gather(index, *args, **kwargs)`` gives ``(args, kwargs)`` for the model, with a row for
            each of the examples ``index``, ``(N,)``. For a model of ``(lengths, images)``, images in dim 1:
            ``lambda index, lengths, images: ((lengths[index], images[:, index]), {})``.
        check: in mode ``"packed"``: whether rows are compared with ordinary runs under Pyro's validation, the first
            time that arguments have these sizes, booleans and strings, and modules are in these modes.
        kwargs: every keyword of :class:`pyro.infer.ELBO`, except ``jit_options``: a traced program would freeze the
            support of its first batch.

    Packed sites are those in one plate and no other: all of one plate together, a row for each joint outcome. Sparse
    sites in further plates inside of it keep padded slots there: as rows they would be combinations of the outcomes of
    all inner elements.

    Raises:
        ValueError: naming the site, for a support above ``max_support``, a prior that is zero where the guide has
            mass, ``to_event`` over a batch dim of a sparse site, or an unknown option; in mode ``"packed"`` for a site
            outside of all plates or in ``pyro.markov``, a plate with a constant ``subsample_size``, a model that raises
            on rows or whose rows see each other; all before gradients change.

    Reference: G. Correia et al., *Efficient marginalization of discrete and structured latent variables via
    sparsity*, NeurIPS 2020, §3, Eq. 4.
    """

    def __init__(
        self,
        mode: str = "padded",
        *,
        max_support: int | None = None,
        chunk_rows: int | None = None,
        gather: Gather | None = None,
        check: bool = True,
        **kwargs: Any,
    ) -> None:
        check_expansion("SparseEnumELBO", MODES, mode, max_support, chunk_rows, gather)
        if kwargs.get("jit_options") is not None:
            raise ValueError(f"SparseEnumELBO: expected no jit_options, got {kwargs['jit_options']}. {_NO_JIT}")
        super().__init__(**kwargs)
        self.mode = mode
        self.max_support = max_support
        self.chunk_rows = chunk_rows
        self.gather = gather
        self.check = check
        self._choice = Choice()  # in mode "auto"
        self._rows = MaskedRows()
        self._record: StepRecord | None = None
        self._rows_compared = Compared()
        self._within: set[frozenset[str]] = set()  # sites whose pyro.markov was looked at: a longer chain has others
        self._compared = False  # whether the program was the same on several values at once as on each alone
        self._warned: set[str] = set()  # sites, and "" for the guide as a whole

    @property
    def last_stats(self) -> SupportStats | None:
        """Supports and model rows of the last step; None before the first. Reading it synchronises with the device."""
        return None if self._record is None else self._record.summary()

    def __call__(self, model: Any, guide: Any) -> LossModule:
        """A module that computes the loss, to be trained by torch optimisers; see :class:`pyro.infer.ELBO`."""
        return LossModule(model, guide, self)

    def _get_traces(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> Iterator[Any]:
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise RuntimeError(f"SparseEnumELBO: expected an eager run, got one under torch.jit.trace. {_NO_JIT}")
        refuse_guide_messenger("SparseEnumELBO", guide)
        self._guess_nesting(model, guide, args, kwargs)
        alone = Alone(model, guide, args, kwargs, "SparseEnumELBO")
        guide = as_costs(guide, args, kwargs)
        if self.vectorize_particles:
            guide, model = self._vectorized_num_particles(guide), self._vectorized_num_particles(model)
        layout = self._layout(model, guide, alone)
        self._record = record = StepRecord()
        for _ in range(1 if self.vectorize_particles else self.num_particles):
            yield from self._enumerate(layout, record, model, guide, alone)
        if self._choice.uncounted:
            self._count_work(model, guide, alone)

    def _guess_nesting(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        if self.max_plate_nesting == float("inf"):
            with buffers_as_they_were():
                guess_nesting(self, model, guide, args, kwargs, on_rows=self.mode == "packed")

    def _layout(self, model: Callable[..., Any], guide: Callable[..., Any], alone: Alone) -> layouts.Layout:
        if self.mode != "auto":
            return layouts.union if self.mode == "union" else layouts.padded
        if not self._choice.ratios:
            self._count_work(model, guide, alone)
        return self._choice.layout(int(self.max_plate_nesting))

    def _count_work(self, model: Any, guide: Any, alone: Alone) -> None:
        def run(layout: layouts.Layout) -> dict[str, SparseSite]:
            guide_enum, model_enum = self._messengers(layout)
            program = model_enum(model), guide_enum(guide), alone.args, alone.kwargs
            with self._explained(alone, guide_enum, model_enum):
                get_importance_trace("flat", self.max_plate_nesting, *program)
            return {**guide_enum.sites, **model_enum.sites}

        with undisturbed(), poutine.block(), evaluated():  # a normalisation has no statistics of the one row of a probe
            self._choice.count(run, int(self.max_plate_nesting))

    def _messengers(self, layout: layouts.Layout) -> tuple[MaskedRowsMessenger, SparseEnumMessenger]:
        """For the guide and for the model, whose dims lie to the left of the guide's."""
        nesting = int(self.max_plate_nesting)
        guide_enum = MaskedRowsMessenger(
            layout, nesting, max_support=self.max_support, first_available_dim=-1 - nesting, whole=self._rows.whole
        )
        model_enum = SparseEnumMessenger(layout, nesting, max_support=self.max_support, guide_sites=guide_enum.visited)
        return guide_enum, model_enum

    def _several(self, *messengers: SparseEnumMessenger) -> Several | None:
        names = [name for messenger in messengers for name in messenger.laid_out]
        particles = self.vectorize_particles and self.num_particles > 1
        return Several(dict.fromkeys(names, ""), names, particles) if names or particles else None

    def _explained(self, alone: Alone, *messengers: SparseEnumMessenger) -> AbstractContextManager[None]:
        return explained(alone, lambda: self._several(*messengers))

    def _check_rows(self, alone: Alone, *messengers: SparseEnumMessenger) -> None:
        """Raises if the program mixes several values (at the first run on them) or leaves a window (at each chain)."""
        several = self._several(*messengers)
        if not is_validation_enabled() or several is None or self.mode == "packed":
            return
        sites = frozenset(several.slots)
        if any(messenger.in_markov for messenger in messengers) and sites not in self._within:
            require_window(alone, sites)
            self._within.add(sites)
        if not self._compared:
            require_row_by_row(alone, several)
            self._compared = True

    def _enumerate(
        self, layout: layouts.Layout, record: StepRecord, model: Any, guide: Any, alone: Alone
    ) -> Iterator[Any]:
        """The traces of one particle: one, or one for each outcome of the sites enumerated sequentially."""
        guide_enum, model_enum = self._messengers(layout)
        with self._rows.around() as put_back:
            pairs = self._traces(guide_enum, model_enum, model, guide, alone)
            traces = [next(pairs)]
            if guide_enum.narrowed:  # what the terms depend on is known once they are there
                traces += pairs
            if again := self._rows.found(guide_enum, [(q, p) for (p, q), _ in traces], {}):
                put_back()
        if again:
            yield from self._enumerate(layout, record, model, guide, alone)
            return
        self._check_rows(alone, guide_enum, model_enum)
        for (model_trace, guide_trace), ran_on in itertools.chain(traces, pairs):
            sites = {**guide_enum.sites, **model_enum.sites}
            self._warn_unread_options(guide_trace)
            if not sites and guide_trace.stochastic_nodes:
                self._warn_no_sparse_site(guide_trace)
            record.add(sites, model_trace, guide_trace, ran_on, self._choice.taken)
            _refuse_zero_prior(guide_enum.sites, model_trace, guide_trace)
            yield model_trace, guide_trace

    def _traces(
        self, guide_enum: SparseEnumMessenger, model_enum: SparseEnumMessenger, model: Any, guide: Any, alone: Alone
    ) -> Iterator[tuple[Pair, Ran | None]]:
        nesting, compared = int(self.max_plate_nesting), self._rows_compared
        on = OnRows("SparseEnumELBO", nesting, self.chunk_rows, self.gather, compared, self.check)

        def rows(guide_trace: poutine.Trace) -> Rows | None:
            if self.mode == "packed":
                return rows_of("SparseEnumELBO", guide_trace, guide_enum.sites)
            if self.mode != "auto":
                return None
            agree = partial(on.agrees, model_enum(model), alone.args, alone.kwargs, guide_trace)
            return self._choice.rows("SparseEnumELBO", guide_trace, agree)

        def run(wrap: Callable[[Any], Any]) -> tuple[Pair, Ran | None]:
            # Errors on packed rows are explained by themselves.
            with nullcontext() if self.mode == "packed" else self._explained(alone, guide_enum, model_enum):
                pair, ran_on = enumerated(model_enum(model), wrap(guide_enum(guide)), alone, on, rows)
            if self.mode == "auto" and ran_on is None:
                self._choice.learn(guide_enum.sites, *pair)
            return pair, ran_on

        return sequential_runs(run)

    def _warn_no_sparse_site(self, guide_trace: poutine.Trace) -> None:
        if "" in self._warned or not self.strict_enumeration_warning:
            return
        self._warned.add("")
        warnings.warn(
            f"SparseEnumELBO: expected a guide site with a sparse support, got sites {guide_trace.stochastic_nodes}. "
            "It goes on as TraceEnum_ELBO. Use pyro_sparse.distributions.SparseCategorical, or another ELBO.",
            stacklevel=2,
        )

    def _warn_unread_options(self, guide_trace: poutine.Trace) -> None:
        for name in guide_trace.stochastic_nodes:
            infer = guide_trace.nodes[name]["infer"] or {}
            unread = [option for option in ("estimator", "baseline") if option in infer]
            if unread and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"SparseEnumELBO, site '{name}': infer['{unread[0]}'] is not read here, but by EstimatorELBO. Use "
                    "that, with Exact() for the sites to be enumerated, or remove it.",
                    stacklevel=2,
                )

    # As Pyro's, but that a loss without a gradient can be had, and that the graph of the last trace, mostly the only
    # one, is kept for who asks for it alone: a compiled network gives away what a second gradient would need.

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, which carries the gradient; without, under ``no_grad``."""
        elbos = [elbo for elbo, _ in self._elbos(model, guide, args, kwargs)]
        loss = -torch.stack(elbos).sum() / self.num_particles if elbos else torch.zeros(())
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"SparseEnumELBO: expected an ELBO that depends on parameters, got {-loss.item():.6g}, which does not. "
                "Give model or guide a parameter, or evaluate it under torch.no_grad()."
            )
        warn_if_nan(loss, "loss")
        return loss

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss; adds the gradient to ``.grad``."""
        total, last = 0.0, None
        several = self.num_particles > 1 and not self.vectorize_particles
        with buffers_kept() if several else nullcontext():
            for elbo, trainable in self._elbos(model, guide, args, kwargs):
                if last is not None:
                    last.backward(retain_graph=True)  # what was computed outside may be shared with what follows
                total += torch_item(elbo) / self.num_particles
                last = -elbo / self.num_particles if trainable and elbo.requires_grad else None
                if several and last is not None:  # the next particle may write to what this one needs
                    last.backward(retain_graph=True)
                    last = None
        if last is not None:
            last.backward(retain_graph=self.retain_graph)
        warn_if_nan(-total, "loss")  # type: ignore[call-overload]
        return -total

    def _elbos(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
        """The ELBO of each trace, where it has terms, and whether there are parameters."""
        for traces in self._get_traces(model, guide, args, kwargs):
            elbo = dice_elbo(*traces)
            if not is_identically_zero(elbo):
                yield elbo, any(node["type"] == "param" for trace in traces for node in trace.nodes.values())

    def compute_marginals(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> OrderedDict[str, Any]:
        """
        As :meth:`pyro.infer.TraceEnum_ELBO.compute_marginals`, over all K outcomes, given one draw from the guide. Of a
        family that is not made of logits, such as ``GibbsFaces``, a ``Categorical`` over the rows of its
        ``enumerate_support()``.
        """
        refuse_guide_messenger("SparseEnumELBO", guide)
        self._guess_nesting(model, guide, args, kwargs)
        options = {"num_particles": self.num_particles, "max_plate_nesting": self.max_plate_nesting}
        return marginals("SparseEnumELBO", model, guide, args, kwargs, **options)

    def sample_posterior(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        As :meth:`pyro.infer.TraceEnum_ELBO.sample_posterior`, over all K outcomes: what the model returns, with the
        guide's sites at a draw from the guide, and its own enumerated ones from the posterior given those.
        """
        refuse_guide_messenger("SparseEnumELBO", guide)
        if self.num_particles != 1:
            raise NotImplementedError(
                f"SparseEnumELBO.sample_posterior: expected num_particles=1, got {self.num_particles}. Call it again."
            )
        self._guess_nesting(model, guide, args, kwargs)
        with poutine.block():
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        given = poutine.replay(model, trace=drawn)
        return posterior_run(given, -1 - int(self.max_plate_nesting), 1, False, *args, **kwargs)


def _refuse_zero_prior(sites: Iterable[str], model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Raises if, at a sparse site, the model is zero where the guide has mass (padding may be zero: it has no mass)."""
    suspects = [n for n in sites if n in model_trace.nodes and model_trace.nodes[n]["log_prob_sum"] == -math.inf]
    for name in suspects:
        with torch.no_grad():
            # Of this site's term alone, by the weights that Pyro gives to the whole ELBO.
            if dice_expectation(name, model_trace, guide_trace) == -math.inf:
                raise ValueError(
                    f"SparseEnumELBO, site '{name}': expected a prior that is positive wherever the guide is, got "
                    "prior probability zero for an outcome in the guide's support: the ELBO is -inf. Give the prior "
                    "mass there, or mask those outcomes in the guide with scores of -inf."
                )
