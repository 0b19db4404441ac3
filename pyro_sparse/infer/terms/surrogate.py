"""The surrogate loss of a run: its paths, and what each site's estimator makes of the site's cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.estimators import Estimator
from pyro_sparse.infer.terms.scores import Run, ScoreSite

Update = Callable[[], None]
Rerun = Callable[[str], list[Run]]


@dataclass(frozen=True)
class Surrogates:
    """
    Attributes:
        find: gives the estimator of a site by its name and plates.
        num_particles: how many particles there are.
        joint: whether they are run one by one but estimated together.
        particle_dim: their dim, if they are vectorised.
    """

    find: Callable[[str, Any], Estimator]
    num_particles: int
    joint: bool
    particle_dim: int

    def of_group(self, group: list[Run], rerun: Rerun) -> tuple[Tensor, list[Update]]:
        """
        The surrogate loss of a group of runs, and what moves the running means afterwards.

        Args:
            group: the runs of one particle, or of all where they are compared.
            rerun: gives the runs of the program in which sites take their mode, or a new draw.
        """
        for run in group:
            run.check_derivatives()
        weighted = any(run.scores or run.log_weight is not None for run in group)
        if weighted and all(run.exact for run in group):
            totals = [-run.attached_elbo() for run in group]
            return sum(totals[1:], totals[0]) / self.num_particles, []
        totals, updates = [], []
        for run in group:
            parts, losses = run.costs.paths(), []
            for score in run.scores:
                term, loss, update = self._score_term(score, run, group, rerun)
                parts.append(term)
                if isinstance(loss, Tensor):
                    losses.append(loss)
                updates.append(update)
            surrogate = sum(parts[1:], parts[0]) if parts else torch.zeros(())
            if run.log_weight is not None:
                surrogate = run.weighted(surrogate + run.elbo() * run.log_weight)
            totals.append(sum(losses, -surrogate))
        total = sum(totals[1:], totals[0])
        return total if self.num_particles == 1 else total / self.num_particles, updates

    def _score_term(self, score: ScoreSite, run: Run, group: list[Run], rerun: Rerun) -> tuple[Tensor, Any, Update]:
        """One site's share of the surrogate, its estimator's own loss, and the update of its running means."""
        name, log_prob = score.site.name, score.site.log_prob
        estimator = self.find(name, score.frames)
        if estimator.num_particles not in (1, self.num_particles):
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected {type(estimator).__name__}({estimator.num_particles}) "
                f"only at sites that the first run reaches, got another, and {self.num_particles} particle(s). Give it "
                "to the ELBO: EstimatorELBO({'*': ...})."
            )
        cost = score.cost(run)
        weight = run.costs.weight(score.dims - {score.own_dim})
        if weight is not None:  # what an ancestor rules out has any log-probability
            log_prob = torch.where(weight > 0, log_prob, 0.0)
        if self.joint and estimator.num_particles > 1:
            if len(group) != self.num_particles:
                raise ValueError(
                    f"EstimatorELBO, site '{name}': expected {type(estimator).__name__}(vectorized=False) without "
                    "sequential enumeration at another site, got both. Draw that site, or use a baseline here."
                )
            # The other particles' costs at this site; they may have taken another branch.
            cost = torch.stack(torch.broadcast_tensors(*(score.cost(other) for other in group)))
            own = torch.tensor([other is run for other in group], device=cost.device)
            log_prob = torch.where(own.reshape(own.shape + (1,) * (cost.dim() - 1)), log_prob, 0.0)
        cost, log_prob = torch.broadcast_tensors(cost, log_prob)
        if estimator.num_particles > 1 and not self.joint:
            weight = None if weight is None else weight.expand_as(cost).movedim(self.particle_dim, 0)
            cost, log_prob = cost.movedim(self.particle_dim, 0), log_prob.movedim(self.particle_dim, 0)
        site = replace(score.site, log_prob=log_prob)
        value, loss = estimator(
            cost,
            replace(
                site,
                rerun=lambda kind: score.average_cost(rerun(kind)),
                attached_cost=lambda: score.attached_cost(run),
            ),
        )
        if log_prob.requires_grad and not value.requires_grad:
            raise ValueError(
                f"EstimatorELBO, site '{site.name}': expected {type(estimator).__name__} to return a surrogate "
                "attached to log_prob, got a detached tensor. Multiply the (detached) coefficients by site.log_prob."
            )
        value = value if weight is None else weight * value
        term = value.sum()
        seen = cost if site.mask is None else torch.where(site.mask, cost, math.nan)  # nothing to learn elsewhere
        return term if score.scale == 1.0 else term * score.scale, loss, lambda: estimator.update(seen, site)
