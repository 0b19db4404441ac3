"""Sequential enumeration: one run for each outcome of the sites that ask for it."""

from __future__ import annotations

import functools
import math
import queue
from collections.abc import Callable, Iterator
from typing import Any

from pyro import poutine
from pyro.infer.enum import iter_discrete_escape, iter_discrete_extend

from pyro_sparse.infer.expansion.law import law


def sequential_runs(run: Callable[[Callable[[Any], Any]], Any]) -> Iterator[Any]:
    """
    What ``run`` returns for each combination of outcomes, given what to wrap the guide in.

    An outcome of probability zero is not run. What an estimator lays out is laid out anew in each run: its values,
    weights and memos belong together. So does what it reparameterises, whose graph is that of its run.
    """
    q: queue.LifoQueue[Any] = queue.LifoQueue()
    q.put(poutine.Trace())
    queued = functools.partial(poutine.queue, queue=q, escape_fn=iter_discrete_escape, extend_fn=_extend)
    while not q.empty():
        yield run(queued)


def _extend(trace: poutine.Trace, site: Any, **ignored: Any) -> Iterator[poutine.Trace]:
    drawn = law(site["fn"])
    for extended in iter_discrete_extend(trace, site, **ignored):
        if bool((drawn.log_prob(extended.nodes[site["name"]]["value"]) == -math.inf).all()):
            continue
        for name in [name for name, node in extended.nodes.items() if "_enumerate_dim" in node.get("infer", {})]:
            extended.remove_node(name)
        yield extended
