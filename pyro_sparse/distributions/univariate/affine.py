r"""
Mixed variables on another scale: what Pyro's ``TransformedDistribution`` of one is.

.. math:: Y = l + s Z, \qquad p(y) = \begin{cases} P_a & y = l + s a, \ a \text{ an atom of } Z \\
    f\bigl(\tfrac{y - l}{s}\bigr) / |s| & \text{elsewhere.} \end{cases}

The probability of an atom has no Jacobian. An affine map moves atoms, and it takes Lebesgue measure to a multiple of
itself, so that all that is known of Z is known of Y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TransformedDistribution, constraints
from pyro.distributions.score_parts import ScoreParts
from torch import Size, Tensor
from torch.distributions import AffineTransform

from pyro_sparse._numerics import as_like
from pyro_sparse.distributions.checks import aligned, checked
from pyro_sparse.distributions.constraints import MixedConstraint, refuse_bijections
from pyro_sparse.distributions.half_precision import in_float32
from pyro_sparse.distributions.mixed.wrappers import Forwarding
from pyro_sparse.distributions.univariate.mixed import MixedDistribution


class AffineMixed(Forwarding, TransformedDistribution):
    """
    A univariate mixed distribution under an affine map; draws, their gradients and score parts are those of the base.

    An atom goes where the map puts it, to rounding: with ``AffineTransform(0.1, 0.7)``, both .8 and .1 + .7 are the
    image of 1.
    """

    base_dist: MixedDistribution
    transforms: list[AffineTransform]

    @classmethod
    def of(cls, base: MixedDistribution, loc: float | Tensor, scale: float | Tensor) -> AffineMixed:
        """The distribution of ``loc + scale * Z``, Z from a base that it broadcasts with."""
        zero = base._zero
        loc, scale = (as_like(x, zero) for x in aligned("AffineTransform", zero, loc=loc, scale=scale))
        if base._validate_args:
            ok = (scale != 0) & scale.isfinite()
            checked("AffineTransform", "scale", scale, ok, "a number that is not zero", "Give the factor.")
        return cls(base, [AffineTransform(loc, scale)], validate_args=base._validate_args)

    @property
    def loc(self) -> Tensor:
        """Where 0 goes, of any shape that broadcasts to the batch's."""
        loc: Any = self.transforms[0].loc
        return loc

    @property
    def scale(self) -> Tensor:
        """By how much it is stretched."""
        scale: Any = self.transforms[0].scale
        return scale

    # The map.

    def image(self, atom: float) -> tuple[Tensor, Tensor]:
        """Where an atom goes, and how far from there a number may be and still be it: zero where nothing is rounded."""
        loc, product = self.loc.detach(), self.scale.detach() * atom
        reach = 2 * torch.finfo(loc.dtype).eps * (loc.abs() + product.abs())
        return loc + product, torch.where((loc != 0) & (product != 0), reach, 0.0)

    def forward(self, z: Tensor) -> Tensor:
        """The values where the base has these. What lies between the atoms stays there."""
        y = self.loc + self.scale * z
        info = torch.finfo(y.dtype)
        for atom in self.base_dist._atoms:
            image, reach = self.image(atom)
            rounded = (z != atom) & ((y - image).abs() <= reach)
            step = (2 * torch.maximum(reach, info.eps * image.abs())).clamp(min=info.tiny)
            aside = torch.where((z > atom) == (self.scale > 0), image + step, image - step)
            y = torch.where(rounded, y + (aside - y).detach(), y)
        return y

    def inverse(self, y: Tensor) -> Tensor:
        """The base's values at these: its atoms exactly, and on the right side of them what is near one."""
        z = (y - self.loc) / self.scale
        info = torch.finfo(z.dtype)
        for atom in self.base_dist._atoms:
            image, reach = self.image(atom)
            above = (y > image) == (self.scale > 0)
            up, down = atom + max(info.tiny, info.eps * abs(atom)), atom - max(info.tiny, info.eps / 2 * abs(atom))
            z = torch.where(above, z.clamp(min=up), z.clamp(max=down))
            z = torch.where((y - image).abs() <= reach, atom, z)
        return z

    def _log_stretch(self, z: Tensor) -> Tensor:
        """log |s| between the atoms, zero at them."""
        log_scale = self.scale.abs().log()
        for atom in self.base_dist._atoms:
            log_scale = torch.where(z == atom, 0.0, log_scale)
        return log_scale

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return AffineConstraint(self)

    # Draws.

    def __call__(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        return self.forward(self.base_dist(Size(sample_shape)))

    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        with torch.no_grad():
            y = self.forward(self.base_dist.sample(sample_shape))
        return y.detach()  # torch.jit.trace does not record no_grad

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        return self.forward(self.base_dist.rsample(sample_shape))

    # Densities.

    def _checked_inverse(self, value: Tensor) -> Tensor:
        if self._validate_args:
            if not value.is_floating_point():
                raise ValueError(
                    f"{type(self).__name__}.log_prob: expected a floating-point value, got {value.dtype}. "
                    "Convert it, e.g. by .float()."
                )
            self._validate_sample(value)
        return self.inverse(value)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of an atom, the log-density elsewhere; as of the base off the support."""
        z = self._checked_inverse(value)
        return self.base_dist.log_prob(z) - self._log_stretch(z)

    def score_parts(self, value: Tensor) -> ScoreParts:
        """Those of the base: what lies in which stratum does not change with the map."""
        z = self._checked_inverse(value)
        log_prob, score, entropy = self.base_dist.score_parts(z)
        stretch = self._log_stretch(z)
        return ScoreParts(log_prob - stretch, score, entropy - stretch)

    def cdf(self, value: Tensor) -> Tensor:
        r""":math:`\Pr(Y \le y)`, right-continuous, with a jump at each atom."""
        z = self._checked_inverse(value)
        below = self.base_dist.cdf(z)
        jump = torch.zeros_like(below)
        for atom, log_weight in zip(self.base_dist._atoms, in_float32(self.base_dist)._log_weights(), strict=False):
            jump = torch.where(z == atom, log_weight.exp().to(jump), jump)
        return torch.where(self.scale > 0, below, 1 - below + jump)

    def icdf(self, value: Tensor) -> Tensor:
        r"""A y at which ``cdf`` reaches ``value``."""
        u = self.base_dist._probability(value)
        return self.forward(self.base_dist.icdf(torch.where(self.scale > 0, u, 1 - u)))

    # Moments.

    @property
    def mean(self) -> Tensor:
        return self.loc + self.scale * self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        return self.scale**2 * self.base_dist.variance

    @property
    def mode(self) -> Tensor:
        """The most probable of the atoms and the inside, the inside standing for its conditional mean."""
        return self.forward(self.base_dist.mode)

    def entropy(self) -> Tensor:
        r""":math:`H(Z) + \Pr(\text{inside}) \log |s|`, w.r.t. the moved atoms and Lebesgue measure."""
        inside = self.base_dist.prob_interior
        log_scale = self.scale.abs().log()
        return self.base_dist.entropy() + inside * log_scale

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_dist}, loc={_shown(self.loc)}, scale={_shown(self.scale)})"


class AffineConstraint(MixedConstraint):
    """The image of a mixed domain, which has atoms where the map puts them."""

    def __init__(self, d: AffineMixed) -> None:
        self.d = d
        base: Any = d.base_dist.support
        images: Any = [d.image(atom)[0] for atom in base.atoms]
        super().__init__(base.domain, tuple(images))

    def check(self, value: Tensor) -> Tensor:
        base: Any = self.d.base_dist.support
        ok: Tensor = base.check(self.d.inverse(value))
        return ok

    def __repr__(self) -> str:
        return f"{_shown(self.d.loc)} + {_shown(self.d.scale)} * {self.d.base_dist.support}"


def _shown(x: Tensor) -> str:
    return f"{x.detach():g}" if x.numel() == 1 else f"{tuple(x.shape)}"


refuse_bijections(AffineConstraint)
