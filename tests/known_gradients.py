"""Estimates of a gradient that is known: what the tests of gradients by quadrature share."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

Program = tuple[Callable[[], None], Callable[[], None]]  # model, guide


def exact_gradient(elbo: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    t = start.clone().requires_grad_()
    return torch.autograd.grad(elbo(t), t)[0]


def estimates(elbo: ELBO, program: Program) -> Tensor:
    """One estimate of the gradient of the ELBO by each copy, ``(n, ...)``."""
    pyro.clear_param_store()
    elbo.loss_and_grads(*program)
    return -pyro.param("theta").grad


def standard_errors(errors: Tensor) -> Tensor:
    """How many standard errors the mean over copies is from zero, for each parameter."""
    return errors.mean(0).abs() / (errors.std(0) / len(errors) ** 0.5)
