"""
Names of Pyro and torch that are not public, each with what it is for: the first place to look after an upgrade.
"""

from __future__ import annotations

from typing import Any

#: pyro.poutine.indep_messenger.CondIndepStackFrame: a plate around a site, with the dim that it took
Frame = Any
