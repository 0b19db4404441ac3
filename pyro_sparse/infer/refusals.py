"""What no ELBO of ours serves, refused in one place."""

from __future__ import annotations

from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger


def refuse_guide_messenger(owner: str, guide: Any) -> None:
    """
    Raises for Pyro's effect-based guides (``GuideMessenger``: ``AutoNormalMessenger`` and its like). A run of one
    is a run of its model with the guide's draws in it, so its trace holds the model's sites too, and a loss that takes
    that trace for the guide's cancels the likelihood.
    """
    guide = poutine.unwrap(guide)
    if isinstance(guide, Messenger):
        raise NotImplementedError(
            f"{owner}: expected a guide function or module, got a GuideMessenger, {type(guide).__name__}. "
            "Write the guide as a function, or use pyro.infer.Trace_ELBO."
        )
