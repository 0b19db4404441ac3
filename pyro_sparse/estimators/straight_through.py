"""The straight-through estimator of a plain discrete site."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pyro_sparse._relaxation import Jacobian, check_stand_in, draw_with_stand_in, straight_through
from pyro_sparse.estimators.base import Estimator, Site
from pyro_sparse.estimators.one_hot import one_hot_view


class StraightThrough(Estimator):
    r"""
    .. math:: \nabla_\theta E_q f \approx \frac{\partial f}{\partial z}(h)\,
        \frac{\partial s}{\partial \theta}, \qquad h \sim q,

    s a smooth stand-in for the draw h: model and guide see h, and its gradient goes on by the Jacobian of s. The loss
    changes, the model does not; the families with the same Jacobians are
    :class:`~pyro_sparse.distributions.OneHotCategoricalST` and :class:`~pyro_sparse.distributions.BernoulliST`.

    **Bias:** yes, unless f is affine (``"softmax"``) or quadratic (``"reinmax"`` at temperature 1);
    :func:`~pyro_sparse.diagnostics.gradient_report` measures it on your model. **Extra model evaluations:** none.
    **Needs from the guide:** ``OneHotCategorical`` or ``Bernoulli``, alone or under ``to_event``, with a model that
    differentiates with respect to the value, and a closed-form KL divergence to the prior, which is taken whatever
    ``analytic_kl`` says.

    Args:
        jacobian: ``"identity"``, ``"softmax"``, ``"reinmax"``, ``"gumbel-softmax"`` or ``"gumbel-rao"``; see
            :class:`~pyro_sparse.distributions.OneHotCategoricalST`.
        temperature: of ``"reinmax"`` and the Gumbel Jacobians, positive: a number, which may be set anew between steps
            (``estimator.temperature = 0.5``), or a tensor that broadcasts to the site's batch shape. One that is an
            ``nn.Parameter`` is trained by the same, biased, gradient.
        num_draws: of ``"gumbel-rao"``.

    Reference: those of :class:`~pyro_sparse.distributions.OneHotCategoricalST`.
    """

    unbiased: ClassVar[bool] = False

    def __init__(self, jacobian: Jacobian = "softmax", temperature: float | Tensor = 1.0, num_draws: int = 10) -> None:
        super().__init__()
        check_stand_in("StraightThrough", jacobian, num_draws)
        self.jacobian = jacobian
        self.temperature = temperature
        self.num_draws = num_draws
        self._check_temperature()

    def _check_temperature(self) -> None:
        positive = self.temperature > 0
        if not (positive if isinstance(positive, bool) else bool(positive.all())):
            raise ValueError(
                f"StraightThrough: expected a positive temperature, got {self.temperature}. Use, say, 0.5."
            )

    def reparameterized(self, site: Site) -> Tensor:
        if not isinstance(self.temperature, Tensor):  # it may be a schedule's
            self._check_temperature()
        fix = "On a Categorical site use OneHotCategorical, with a model that takes unit vectors; or RELAX."
        view = one_hot_view("StraightThrough", site, indices=False, fix=fix)
        hard, soft = draw_with_stand_in(view.logits, self.jacobian, self.temperature, self.num_draws)
        return straight_through(view.value(hard), view.value(soft))
