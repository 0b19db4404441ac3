"""Baselines: what to subtract from the cost in the score-function estimator. One short class each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse._autograd import graph_leaves
from pyro_sparse._precision import widened
from pyro_sparse.estimators.base import Baseline, Plate, Site


class MovingAverage(Baseline):
    r"""
    .. math:: b \leftarrow b + \alpha_t\,(\bar f - b), \qquad \alpha_t = (1 - \beta) / (1 - \beta^t),

    the bias-corrected running mean of the costs of earlier steps, pooled over plates; zero at the first step. Costs
    that are NaN or infinite are left out; where there are no others, it stays.

    **Bias:** none: the value is used before it moves. **Extra model evaluations:** none.

    Args:
        beta: how much of the past is kept, in [0, 1).
        num_data: with a number, one running mean for each element of the one data plate, by its index in the full
            data (never by its place in the batch).

    Reference: D. Wingate, T. Weber, *Automated variational inference in probabilistic programming*, 2013, §3.
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, beta: float = 0.9, num_data: int | None = None) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"MovingAverage: expected beta in [0, 1), got {beta!r}. Use, say, 0.9.")
        self.beta = beta
        self.num_data = num_data
        shape = () if num_data is None else (num_data,)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("weight", torch.zeros(shape))  # 1 + beta + beta^2 + ..., whose inverse is the rate

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        if self.num_data is None:
            return self.mean.to(cost, copy=True), 0.0
        plate = self._plate(site)
        return self.mean[self._rows(plate)].reshape(site.batch_shape).to(cost), 0.0

    def update(self, cost: Tensor, site: Site) -> None:
        cost = widened(cost)
        if self.num_data is None:
            mean, weight = self._moved(self.mean, self.weight, mean_of_finite(cost))
            self.mean.copy_(mean)
            self.weight.copy_(weight)
            return
        plate = self._plate(site)
        rows = self._rows(plate)
        average = mean_of_finite(cost.movedim(plate.dim, -1).reshape(-1, plate.size), 0)
        self.mean[rows], self.weight[rows] = self._moved(self.mean[rows], self.weight[rows], average)

    def _moved(self, mean: Tensor, weight: Tensor, average: Tensor) -> tuple[Tensor, Tensor]:
        average, more = average.to(mean), self.beta * weight + 1.0
        moves = average.isfinite()
        return torch.where(moves, mean.lerp(average, more.reciprocal()), mean), torch.where(moves, more, weight)

    def _plate(self, site: Site) -> Plate:
        if len(site.plates) != 1 or site.plates[0].full_size != self.num_data:
            raise ValueError(
                f"MovingAverage, site '{site.name}': expected one data plate of num_data={self.num_data}, got "
                f"{[(plate.name, plate.full_size) for plate in site.plates]}. Leave num_data out to pool over plates."
            )
        return site.plates[0]

    def _rows(self, plate: Plate) -> Tensor:
        return torch.arange(plate.size, device=self.mean.device) if plate.indices is None else plate.indices


class TrainableConstant(Baseline):
    r"""
    A number b, trained by gradients of :math:`(f - b)^2`.

    **Bias:** none. **Extra model evaluations:** none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.zeros(()))

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        value = self.constant.to(cost)
        return value, mean_square(cost - value, site)


class NeuralBaseline(Baseline):
    r"""
    A network b(x), trained by gradients of :math:`(f - b(x))^2`.

    **Bias:** none: it does not see z. **Extra model evaluations:** none, but its own. The check for NaN waits for the
    device. Centre it by
    ``Sum(MovingAverage(), NeuralBaseline(net))``: it then learns differences only.

    Args:
        net: any module. Its output has the site's batch shape, or ``(B, 1)`` with exactly one data plate.
        inputs: a function of the guide's arguments that gives the network's input; the default is the first argument.
            Where its leading size is a subsampled plate's full size, the subsample's rows are selected.

    Raises:
        ValueError: naming the site, for an output of another shape, with NaN, or attached to anything but ``net``.

    Reference: A. Mnih, K. Gregor, *Neural variational inference and learning in belief networks*, ICML 2014, §2.3.
    """

    def __init__(self, net: nn.Module, inputs: Callable[..., Any] | None = None) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"NeuralBaseline: expected an nn.Module, got {net!r}. Wrap it in one.")
        self.net = net
        self.inputs = inputs

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        value = self._shaped(self.net(network_input("NeuralBaseline", site, self.inputs)), site)
        require_own_graph(f"NeuralBaseline, site '{site.name}'", value, self)
        return value, mean_square(cost - value, site)

    def _shaped(self, value: Tensor, site: Site) -> Tensor:
        shape = site.batch_shape
        if len(site.plates) == 1 and value.shape == (site.plates[0].size, 1) and value.shape != shape:
            value = value.squeeze(-1)
        if value.shape != shape:
            raise ValueError(
                f"NeuralBaseline, site '{site.name}': expected an output of the site's batch shape {tuple(shape)}, got "
                f"{tuple(value.shape)}. Use one output unit, and inputs= that give one row for each data-plate element."
            )
        return value


class SelfCritic(Baseline):
    """
    The cost at the mode: one extra run in which every score-function site takes its most probable value, given the
    modes before it, and all other sites a new draw.

    **Bias:** none. **Extra model evaluations:** 1, without gradients; running statistics of batch normalisation do not
    move in it. **Needs from the guide:** distributions with a mode.

    Reference: S. Rennie et al., *Self-critical sequence training for image captioning*, CVPR 2017, Eq. 8.
    """

    kind = "mode"

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        assert site.rerun is not None
        return site.rerun(self.kind), 0.0


class SampleBaseline(SelfCritic):
    """
    The cost of an independent draw, detached: undetached it would multiply the model's gradient.

    **Bias:** none. **Extra model evaluations:** 1, without gradients. :class:`LeaveOneOut` makes use of both draws.

    Reference: W. Aziz, *Advanced approximate inference for discrete LVMs*, University of Amsterdam, 2022.
    """

    kind = "sample"


class Scaled(Baseline):
    r"""
    .. math:: \bar f + c\,(b - \bar b), \qquad c = \frac{\mathrm{Cov}(f, b)}{\mathrm{Var}(b)}

    the linear function of b with the least variance, means and moments taken from earlier steps (bias-corrected
    running ones; of finite costs). Until there is a step to learn from, or where b has not varied, it is b itself.

    **Bias:** none. **Extra model evaluations:** those of b.

    Args:
        baseline: b.
        beta: how much of the past the moments keep, in [0, 1).

    Reference: J. Paisley, D. Blei, M. Jordan, *Variational Bayesian inference with stochastic search*, ICML 2012,
    Eq. 10.
    """

    moments: Tensor
    weight: Tensor

    def __init__(self, baseline: Baseline, beta: float = 0.9) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"Scaled: expected beta in [0, 1), got {beta!r}. Use, say, 0.9.")
        self.baseline = baseline
        self.beta = beta
        self.register_buffer("moments", torch.zeros(4))  # mean of f, mean of b, covariance, variance of b
        self.register_buffer("weight", torch.zeros(()))

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        value, loss = self.baseline(cost, site)
        site.memo[self] = value = widened(value.detach())
        mean, centre, covariance, variance = self.moments
        # A constant's variance is that of rounding, and its covariance too: their ratio would be noise.
        varies = variance > (100 * torch.finfo(value.dtype).eps * centre).square()
        slope = covariance / torch.where(varies, variance, 1.0)
        return torch.where(varies, mean + slope * (value - centre), value), loss

    def update(self, cost: Tensor, site: Site) -> None:
        cost, value = widened(cost), site.memo[self].expand_as(cost)
        weight = self.beta * self.weight + (1 - self.beta)
        rate = (1 - self.beta) / weight
        missing = (cost + value).isfinite().logical_not()
        x, y = cost.masked_fill(missing, math.nan), value.masked_fill(missing, math.nan)
        f, b = x.nanmean(), y.nanmean()
        step_f, step_b = f - self.moments[0], b - self.moments[1]
        covariance = ((x - f) * (y - b)).nanmean() + (1 - rate) * step_f * step_b
        variance = (y - b).square().nanmean() + (1 - rate) * step_b.square()
        moments = torch.stack([f, b, covariance, variance]).to(self.moments)
        moves = moments.isfinite().all()
        self.moments.copy_(torch.where(moves, self.moments.lerp(moments, rate), self.moments))
        self.weight.copy_(torch.where(moves, weight, self.weight))
        self.baseline.update(cost, site)


class Sum(Baseline):
    """
    Two baselines, the second fitted to what the first leaves: ``Sum(MovingAverage(), NeuralBaseline(net))``.

    **Bias:** none. **Extra model evaluations:** those of both.
    """

    def __init__(self, first: Baseline, second: Baseline) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        first, first_loss = self.first(cost, site)
        site.memo[self] = first = first.detach()
        second, second_loss = self.second(cost - first, site)
        return first + second, first_loss + second_loss

    def update(self, cost: Tensor, site: Site) -> None:
        self.first.update(cost, site)
        self.second.update(widened(cost) - site.memo[self], site)


def mean_of_finite(cost: Tensor, dim: int | None = None) -> Tensor:
    """The mean over what is finite; NaN where nothing is."""
    return cost.masked_fill(cost.isfinite().logical_not(), math.nan).nanmean(dim)


def mean_square(error: Tensor, site: Site) -> Tensor:
    """Over the elements that count; zero without any."""
    if site.mask is None:
        return error.square().mean()
    counts = site.mask.expand_as(error)
    return torch.where(counts, error, 0.0).square().sum() / counts.sum().clamp(min=1)


def network_input(owner: str, site: Site, inputs: Callable[..., Any] | None) -> Any:
    """What a function of the guide's arguments (or the first of them) gives, in the rows of a subsampled plate."""
    if inputs is None and not site.args:
        raise ValueError(
            f"{owner}, site '{site.name}': expected a first argument of the guide, got keywords only. "
            "Say inputs=lambda **kwargs: ..."
        )
    x = site.args[0] if inputs is None else inputs(*site.args, **site.kwargs)
    for plate in site.plates:
        subsampled = plate.size < plate.full_size and plate.indices is not None
        if subsampled and isinstance(x, Tensor) and x.shape[:1] == (plate.full_size,):
            return x[plate.indices]
    return x


def require_own_graph(owner: str, value: Tensor, module: nn.Module) -> None:
    """Raises if ``value`` has NaN, or a gradient that would reach a leaf other than the parameters of ``module``."""
    if value.isnan().any():
        raise ValueError(f"{owner}: expected a number for each element, got NaN. Look at the network and its inputs.")
    own = {id(parameter) for parameter in module.parameters()}
    for leaf in graph_leaves([value.grad_fn]):
        if id(leaf) not in own:
            raise ValueError(
                f"{owner}: expected a value that depends on the network's own parameters, got one attached to another "
                f"tensor, of shape {tuple(leaf.shape)}. Detach the inputs: inputs=lambda x: f(x).detach()."
            )
