"""Hidden Markov models whose transition matrix has exact zeros, at the cost of the transitions that exist."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.hmm import HiddenMarkovModel
from torch import Size, Tensor

from pyro_sparse._autograd import is_true
from pyro_sparse._numerics import entropy_terms, safe_log
from pyro_sparse._precision import categorical, widened
from pyro_sparse.distributions.discrete.edges import Edges, edges_of
from pyro_sparse.distributions.discrete.sparse_categorical import SparseCategorical

_NO_JIT = "Tracing would freeze the transitions of the first matrix; run it eagerly."


class _Chains(NamedTuple):
    """
    What a pass forward leaves, with S states, G groups of chains that have transitions of their own, C chains in each,
    N = G · S: for each step ``(N, C)`` log-weights of what is seen until then.
    """

    edges: list[Edges]  #: of each step
    arrived: list[Tensor]  #: before the step's observation
    messages: list[Tensor]  #: and with it, up to a constant of each chain and step
    constant: Tensor  #: their sum over the steps, ``(G, C)``
    going: Tensor | None  #: whether the chain still goes on, ``(T, N, C)``


class SparseHMM(HiddenMarkovModel):
    r"""
    .. math:: p(y_{1:T}) = \sum_{x_0, \dots, x_T} \pi_{x_0} \prod_{t=1}^T P_{x_{t-1} x_t}\, p(y_t \mid x_t)

    :class:`~pyro.distributions.DiscreteHMM` for a transition matrix P with exact zeros: the sum runs along the
    transitions of positive probability, so that a step costs :math:`O(E)` time, E their number, where a dense one costs
    :math:`O(S^2)`, and for the gradient it keeps :math:`O(S)` numbers for each chain. Steps follow each other in a
    Python loop: T of them take T times as long, where ``DiscreteHMM`` has :math:`O(S^3 \log T)` on parallel hardware.
    Everything is in log space, each state with a maximum of its own. With half precision results are in float32.

    As in ``DiscreteHMM`` there is a transition before the first observation, and time is part of the event. The paths
    of :meth:`smooth`, :meth:`viterbi`, :meth:`sample_posterior` and :meth:`posterior_entropy` are :math:`x_{1:T}`; the
    state :math:`x_0` before them is summed out.

    **Base measure:** that of ``observation_dist``, T times; **rsample:** no; **enumerable:** no: its states are summed
    out. What sums over paths waits for the device twice: which edges there are decides what is computed.

    =========== ================================== ===================================================
    shape       parameter                          a value
    =========== ================================== ===================================================
    batch       the left dims of all, broadcast    ``batch_shape``
    event                                          ``(T,) + observation_dist.event_shape``
    =========== ================================== ===================================================

    >>> transition = SparseCategorical(torch.tensor([[1.0, 0.6, -2.0], [-2.0, 1.0, 0.6], [0.6, -2.0, 1.0]]))
    >>> d = SparseHMM(torch.zeros(3), transition, dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 0.5), duration=4)
    >>> d.event_shape, d.viterbi(torch.tensor([-1.0, 0.1, 0.9, 1.1])).tolist()
    (torch.Size([4]), [0, 1, 2, 2])

    Args:
        initial_logits: of :math:`x_0`, up to a constant, broadcastable to ``batch_shape + (S,)``; -inf is allowed.
        transition: :math:`P`, a row for each state: its ``batch_shape`` is broadcastable to
            ``batch_shape + (T, S)``, with S outcomes. One matrix has batch shape ``(S,)``; one for each of B chains,
            ``(B, 1, S)``.
        observation_dist: of :math:`y_t` given each state: batch shape broadcastable to ``batch_shape + (T, S)``.
        validate_args: as in torch; checks initial logits, lengths, values, and that a value is possible.
        duration: T, needed to draw where no parameter varies in time.
        lengths: how many of its T steps each chain has, integers broadcastable to ``batch_shape``, 1 to T. What comes
            after them is ignored; the state stays where it was.

    Raises:
        TypeError: a transition that is no :class:`SparseCategorical`, logits or lengths of the wrong kind.
        ValueError: for shapes that do not fit, initial logits with NaN, +inf or -inf only, lengths that are not in 1 to
            T; and by its methods for an observation with NaN, of another length, or one that no path can have given.
        RuntimeError: under ``torch.jit.trace``.

    Reference: L. Rabiner, *A tutorial on hidden Markov models and selected applications in speech recognition*,
    Proceedings of the IEEE 77(2), 1989, §III; D. Hernando, V. Crespi and G. Cybenko, *Efficient computation of the
    hidden Markov model entropy for a given observation sequence*, IEEE Transactions on Information Theory 51(7), 2005.
    """

    arg_constraints = {"initial_logits": constraints.real_vector}

    def __init__(
        self,
        initial_logits: Tensor,
        transition: SparseCategorical,
        observation_dist: TorchDistribution,
        validate_args: bool | None = None,
        duration: int | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> None:
        shape = _broadcast(initial_logits, transition, observation_dist, lengths)
        initial_logits = widened(initial_logits)
        self.initial_logits = initial_logits - _logsumexp(initial_logits).unsqueeze(-1)
        self.transition = transition
        self.observation_dist = observation_dist
        self.lengths = lengths
        if duration is not None and duration < 1:
            raise ValueError(f"SparseHMM.duration: expected a positive number of steps, got {duration}. Leave it out.")
        if duration is not None and shape[-1] not in (1, duration):
            raise ValueError(
                f"SparseHMM.duration: expected {shape[-1]}, the steps of its parameters, got {duration}. Leave it out; "
                "what varies by chain and not in time has a batch shape of (B, 1, S)."
            )
        event_shape = shape[-1:] + observation_dist.event_shape
        super().__init__(duration, shape[:-1], event_shape, validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        if self._validate_args:
            if not is_true(initial_logits.detach().amax(-1).isfinite()):  # NaN is the largest of all
                raise ValueError(
                    "SparseHMM.initial_logits: expected numbers or -inf, one above -inf in every row, got NaN, +inf or "
                    "a row of -inf only. Check the network, or leave a state to start from."
                )
            self._check_lengths(self.duration)

    def _check_lengths(self, steps: int | None) -> None:
        if self.lengths is None:
            return
        most = math.inf if steps is None else steps
        if not is_true((self.lengths >= 1) & (self.lengths <= most)):
            few, many = int(self.lengths.min()), int(self.lengths.max())
            raise ValueError(
                f"SparseHMM.lengths: expected 1 to {most} steps, got {few} to {many}. Drop empty sequences, and pad "
                "values to the longest."
            )

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self.observation_dist.support, 1)

    @property
    def num_states(self) -> int:
        """S."""
        return self.transition.num_outcomes

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> SparseHMM:
        """A view with a larger batch shape; transitions and observations are not copied."""
        new = self._get_checked_instance(SparseHMM, _instance)
        batch_shape = Size(torch.broadcast_shapes(self.batch_shape, Size(batch_shape)))
        new.initial_logits = self.initial_logits.expand((*batch_shape, -1))
        new.transition, new.observation_dist, new.lengths = self.transition, self.observation_dist, self.lengths
        super(SparseHMM, new).__init__(self.duration, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_likelihood(*self._forward(value)[:2])

    def filter(self, value: Tensor) -> dist.Categorical:
        """
        The posterior of the last state: a stock ``Categorical`` of batch shape ``batch_shape``, as of ``DiscreteHMM``.
        Its logits serve as ``initial_logits`` of what follows.
        """
        chains, shape = self._possible(value)
        return dist.Categorical(logits=self._states(chains.messages[-1], shape), validate_args=False)

    def smooth(self, value: Tensor) -> SparseCategorical:
        """The posterior marginals of all states: a :class:`SparseCategorical` of batch shape ``batch_shape + (T,)``."""
        chains, shape = self._possible(value)
        marginals = [marginal for marginal, _ in self._backward(chains)]
        probs = torch.stack([self._states(m, shape) for m in reversed(marginals)], -2)
        return SparseCategorical(probs=probs, validate_args=False)

    def posterior_entropy(self, value: Tensor) -> Tensor:
        r"""The entropy :math:`H(x_{1:T} \mid y_{1:T})` of the posterior path in nats, shape ``batch_shape``."""
        chains, shape = self._possible(value)
        total = entropy_terms(self._log_marginals(chains.messages[-1]))
        for _, step in self._backward(chains):
            total = total + step
        return self._states(total, shape).sum(-1)

    @torch.no_grad()
    def viterbi(self, value: Tensor) -> Tensor:
        """The most probable path given the observations, integers of shape ``batch_shape + (T,)``."""
        chains, shape = self._possible(value, best=True)
        return self._trace_back(chains, shape, Size(), lambda scores, _: scores.argmax(-1))

    @torch.no_grad()
    def sample_posterior(self, value: Tensor, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Paths drawn given the observations, integers of shape ``sample_shape + batch_shape + (T,)``."""
        chains, shape = self._possible(value)
        return self._trace_back(chains, shape, Size(sample_shape), lambda s, n: categorical(s.softmax(-1), n))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """
        Draws all T steps, also those after ``lengths``, which :meth:`log_prob` ignores. As in ``DiscreteHMM``
        observations are drawn for all states and selected.
        """
        if self.duration is None:
            raise ValueError(
                "SparseHMM.sample: expected a number of steps, got parameters that do not vary in time. Give duration=."
            )
        shape, S = Size(sample_shape) + self.batch_shape, self.num_states
        state = categorical(self.initial_logits.expand((*shape, S)).softmax(-1), Size())
        rows = self.transition.probs.expand((*self.batch_shape, self.duration, S, S))
        states = []
        for t in range(self.duration):
            probs = rows[..., t, :, :].expand((*shape, S, S))
            index = state.reshape((*shape, 1, 1)).expand((*shape, 1, S))
            state = categorical(probs.gather(-2, index).squeeze(-2), Size())
            states.append(state)
        observations = self.observation_dist.expand((*self.batch_shape, self.duration, S)).sample(Size(sample_shape))
        event = self.observation_dist.event_shape
        index = torch.stack(states, -1).reshape((*shape, self.duration, 1, *(1,) * len(event)))
        drawn = observations.gather(len(shape) + 1, index.expand((*shape, self.duration, 1, *event)))
        return drawn.squeeze(len(shape) + 1)

    # Layout: chains in groups, (N, C), where the edges of one graph serve all C.

    def _states(self, x: Tensor, shape: Size) -> Tensor:
        """From ``(N, C)`` to ``shape + (S,)``."""
        return x.unflatten(0, (-1, self.num_states)).permute(2, 0, 1).reshape((*shape, self.num_states))

    def _log_marginals(self, messages: Tensor) -> Tensor:
        groups = messages.unflatten(0, (-1, self.num_states))
        total = _logsumexp(groups, 1).unsqueeze(1)
        return (groups - torch.where(total == -math.inf, 0.0, total)).reshape(messages.shape)

    def _log_likelihood(self, chains: _Chains, shape: Size) -> Tensor:
        return _logsumexp(self._states(chains.messages[-1], shape)) + chains.constant.T.reshape(shape)

    def _possible(self, value: Tensor, best: bool = False) -> tuple[_Chains, Size]:
        chains, shape = self._forward(value, best)
        if self._validate_args and not is_true(self._log_likelihood(chains, shape).detach() != -math.inf):
            raise ValueError(
                "SparseHMM: expected an observation that some path can give, got one of probability zero. It has "
                "no posterior; allow more transitions, or check the data."
            )
        return chains, shape

    def _forward(self, value: Tensor, best: bool = False) -> tuple[_Chains, Size]:
        """Log-weights of all states at each step, summed over the paths to them (or of the best of those)."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise RuntimeError(f"SparseHMM: expected an eager run, got one under torch.jit.trace. {_NO_JIT}")
        logits = self._observed(value)
        shape, (T, S) = logits.shape[:-2], logits.shape[-2:]
        # Transitions that differ along a batch dim make groups of it and of all dims to its right.
        batch = self.transition.batch_shape[:-2]
        batch = Size((1,) * (len(shape) - len(batch))) + batch
        own = next((d for d, size in enumerate(batch) if size != 1), len(shape))
        groups, C = math.prod(shape[own:]), math.prod(shape[:own])

        def inward(x: Tensor) -> Tensor:
            x = x.expand((*shape, *x.shape[-2:])).reshape(C, groups, x.shape[-2], S)
            return x.permute(2, 1, 3, 0).flatten(1, 2)

        probs = self.transition.probs.to(logits.dtype)
        probs = probs.reshape((1,) * (3 - probs.dim()) + probs.shape)
        steps = probs.shape[-3]
        probs = probs.reshape(probs.shape[own - len(shape) - 3 :]).expand((*shape[own:], steps, S, S))
        graphs = edges_of(probs.reshape(groups, steps, S, S).transpose(0, 1))
        edges = graphs * T if steps == 1 else graphs
        until = self._goes_on(T)
        going = None if until is None else inward(until.unsqueeze(-1).expand((*until.shape, S)))
        message = inward(self.initial_logits.to(logits.dtype).unsqueeze(-2))[0]
        # Each step starts near zero: what has been summed up would round the differences between states.
        constant = message.new_zeros((groups, C))
        arrived, messages = [], []
        for t, seen in enumerate(inward(logits)):
            # The state before the first observation is summed out, of the best path too.
            came = edges[t].maximum(message) if best and t else edges[t].log_sum(message)
            message = came + seen if going is None else torch.where(going[t], came + seen, message)
            grouped = message.reshape(groups, S, C)
            top = grouped.detach().amax(1).clamp_min(torch.finfo(message.dtype).min)
            constant = constant + top
            message = (grouped - top.unsqueeze(1)).reshape(groups * S, C)
            arrived.append(came)
            messages.append(message)
        return _Chains(edges, arrived, messages, constant, going), shape

    def _observed(self, value: Tensor) -> Tensor:
        """The log-probability of each observation given each state, ``shape + (T, S)``."""
        d, event_dim = self.observation_dist, self.observation_dist.event_dim
        T = value.shape[-self.event_dim] if value.dim() >= self.event_dim else 0
        if T == 0 or self.duration not in (None, T):
            steps = self.duration or "one or more"
            raise ValueError(
                f"SparseHMM: expected {steps} observations of shape {tuple(d.event_shape)}, got "
                f"{tuple(value.shape)}. Put time before the dims of one observation."
            )
        if self._validate_args:
            self._check_lengths(T)
        if (until := self._goes_on(T)) is not None:
            # What comes after the end may be anything: the first observation is one that the family knows.
            first = value.narrow(-self.event_dim, 0, 1)
            value = torch.where(until.reshape(until.shape + (1,) * event_dim), value, first)
        if self._validate_args:
            if value.is_floating_point() and not is_true(~value.isnan()):
                raise ValueError(
                    "SparseHMM: expected observations without NaN, got one with. Put any value in place of what is "
                    "missing, and mask it: observation_dist.mask(m), m of shape (*batch, T, 1); or give lengths=."
                )
        logits = widened(d.log_prob(value.unsqueeze(-1 - event_dim)))
        shape = torch.broadcast_shapes(logits.shape[:-2], self.batch_shape)
        dtype = torch.promote_types(logits.dtype, self.initial_logits.dtype)
        dtype = torch.promote_types(dtype, self.transition.probs.dtype)
        return logits.expand((*shape, T, self.num_states)).to(dtype)

    def _goes_on(self, steps: int) -> Tensor | None:
        """Whether each chain has so many steps, ``(*batch, T)``; None where all have."""
        if self.lengths is None:
            return None
        return self.lengths.unsqueeze(-1) > torch.arange(steps, device=self.lengths.device)

    def _backward(self, chains: _Chains) -> Iterator[tuple[Tensor, Tensor]]:
        """
        From the last step to the first: the marginals of its states, and what the entropy of the path gains when the
        state before it is added, both ``(N, C)``.
        """
        marginal = self._log_marginals(chains.messages[-1]).exp()
        zeros = torch.zeros_like(marginal)
        for t in reversed(range(1, len(chains.messages))):
            edges = chains.edges[t]
            origins = edges.log_origins(chains.messages[t - 1], chains.arrived[t])
            ending = marginal.index_select(0, edges.target)
            before = zeros.index_add(0, edges.source, origins.exp() * ending)
            gain = zeros.index_add(0, edges.source, entropy_terms(origins) * ending)
            if chains.going is not None:
                before = torch.where(chains.going[t], before, marginal)
                gain = torch.where(chains.going[t], gain, 0.0)
            yield marginal, gain
            marginal = before
        yield marginal, zeros

    def _trace_back(
        self, chains: _Chains, shape: Size, sample_shape: Size, choose: Callable[[Tensor, Size], Tensor]
    ) -> Tensor:
        S, last = self.num_states, chains.messages[-1]
        groups = last.unflatten(0, (-1, S)).movedim(1, -1)  # (G, C, S)
        offset = S * torch.arange(len(groups), device=last.device).unsqueeze(-1)
        nodes = offset + choose(groups, sample_shape)  # sample_shape + (G, C)
        path = [nodes]
        for t in reversed(range(1, len(chains.messages))):
            sources, scores = chains.edges[t].arrivals(chains.messages[t - 1], nodes)
            going = None if chains.going is None else chains.going[t].unflatten(0, (-1, S))[:, 0]
            if going is not None:  # no edge may lead to where a chain has stopped
                scores = torch.where(going, scores, 0.0)
            chosen = choose(scores.movedim(0, -1), Size())
            before = sources.gather(0, chosen.unsqueeze(0)).squeeze(0)
            nodes = before if going is None else torch.where(going, before, nodes)
            path.append(nodes)
        states = torch.stack(path[::-1], -1) - offset.unsqueeze(-1)  # sample_shape + (G, C, T)
        return states.transpose(-2, -3).reshape(sample_shape + shape + states.shape[-1:])


def _logsumexp(x: Tensor, dim: int = -1) -> Tensor:
    """As torch's, with gradient zero where all are -inf."""
    top = x.detach().amax(dim, keepdim=True).clamp_min(torch.finfo(x.dtype).min)
    return safe_log((x - top).exp().sum(dim)) + top.squeeze(dim)


def _broadcast(
    initial_logits: Tensor, transition: SparseCategorical, observation_dist: TorchDistribution, lengths: Tensor | None
) -> Size:
    """``batch_shape + (T,)``; raises where the parts do not fit each other."""
    if not isinstance(initial_logits, Tensor) or not initial_logits.is_floating_point():
        got = str(initial_logits.dtype) if isinstance(initial_logits, Tensor) else type(initial_logits).__name__
        raise TypeError(f"SparseHMM.initial_logits: expected a floating-point tensor, got {got}. Use .float().")
    if not isinstance(transition, SparseCategorical):
        raise TypeError(
            f"SparseHMM.transition: expected a SparseCategorical, got {type(transition).__name__}. Give it scores, or "
            "probs=, with a row for each state."
        )
    S = transition.num_outcomes
    sizes = {
        "transition.batch_shape": tuple(transition.batch_shape),
        "initial_logits": tuple(initial_logits.shape),
        "observation_dist.batch_shape": tuple(observation_dist.batch_shape),
    }
    for name, size in sizes.items():
        if size[-1:] != (S,):
            raise ValueError(
                f"SparseHMM.{name}: expected to end in {S}, the number of states (outcomes of the transition), got "
                f"{size}. Its last dim is the state that a step starts from or is seen in."
            )
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype is torch.bool:
            got = str(lengths.dtype) if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"SparseHMM.lengths: expected a tensor of integers, got {got}. Use .long().")
        sizes["lengths"] = tuple(lengths.shape)
    start, rows, seen = initial_logits.shape[:-1], transition.batch_shape[:-1], observation_dist.batch_shape[:-1]
    counted = () if lengths is None else (*lengths.shape, 1)
    try:
        shape = torch.broadcast_shapes((*start, 1), rows, seen, counted)
    except RuntimeError:
        got = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"SparseHMM: expected shapes that broadcast to batch_shape + (T, {S}), initial_logits and lengths without "
            f"the time, got {got}. One transition matrix for each of B chains has batch shape (B, 1, {S})."
        ) from None
    return shape
