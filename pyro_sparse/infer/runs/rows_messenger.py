"""What a model sees of packed rows: its plate has one where the guide's has an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sparse.infer.expansion.rows import Rows
from pyro_sparse.infer.pyro_internals import is_subsample


class RowsMessenger(Messenger):
    """
    In a model: its plate has a row where the guide's has an example.

    Args:
        owner: the ELBO, in errors.
        rows: the rows.
        indices: of the plate's elements; None if it is not subsampled.
        placed: says what was given a row for each, in errors.
    """

    def __init__(self, owner: str, rows: Rows, indices: Tensor | None, placed: Callable[[], str]) -> None:
        super().__init__()
        self.owner, self.rows, self.placed = owner, rows, placed
        self.indices = torch.arange(rows.sizes[-1], device=rows.index.device) if indices is None else indices

    def _pyro_sample(self, msg: Any) -> None:
        plates = [frame.name for frame in msg["cond_indep_stack"]]
        if msg["name"] in self.rows.sites and self.rows.frame.name not in plates:
            raise ValueError(
                f"{self.owner}, site '{msg['name']}': expected it in plate '{self.rows.frame.name}' in the model, as "
                f"in the guide, got {plates}. Use one name, or mode='padded'."
            )
        if not is_subsample(msg["fn"]):
            return
        rows, given, asked = self.rows, msg["value"], msg["fn"].subsample_size
        if msg["name"] != rows.frame.name:
            if given is not None and len(given) != (asked or msg["fn"].size) == rows.count:  # the guide's indices
                raise ValueError(
                    f"{self.owner}, plate '{msg['name']}': expected {len(given)} elements, as in the guide, got "
                    f"{rows.count}, the number of packed rows of plate '{rows.frame.name}'. Take its size from what is "
                    "given no row for each, or use mode='padded'."
                )
            return
        if asked is not None and asked != rows.count:
            raise ValueError(
                f"{self.owner}, plate '{msg['name']}': expected as many elements as there are rows, got "
                f"subsample_size={asked}, a number that is not the data's. {self.placed()}. Use "
                "subsample_size=len(x), x one of these, or place others by gather=."
            )
        if given is not None:
            if len(given) != rows.count:  # indices that are no argument
                msg["value"] = given[rows.example]
        elif msg["fn"].size == rows.count:
            msg["value"] = torch.arange(rows.count, device=self.indices.device)
        else:
            msg["value"] = self.indices[rows.example]

    def _pyro_param(self, msg: Any) -> None:
        inside = any(f.name == self.rows.frame.name for f in msg["cond_indep_stack"])
        if inside and msg["kwargs"].get("event_dim") is not None and msg["name"] not in pyro.get_param_store():
            raise ValueError(
                f"{self.owner}, param '{msg['name']}': expected a parameter with an element for each of plate "
                f"'{self.rows.frame.name}' before the first run on packed rows, whose number is another at each step, "
                "got none. Run model and guide once before (poutine.trace), or make it outside of the model."
            )

    def _pyro_post_param(self, msg: Any) -> None:
        self._take_rows(msg)

    def _pyro_post_subsample(self, msg: Any) -> None:
        self._take_rows(msg)

    def _take_rows(self, msg: Any) -> None:
        """Of what has an element for each datum in this plate, before the plate takes its subsample."""
        event_dim = msg["kwargs"].get("event_dim")
        frames = [f for f in msg["cond_indep_stack"] if f.name == self.rows.frame.name and f.dim is not None]
        if event_dim is None or not frames:
            return
        value, dim = msg["value"], frames[0].dim - event_dim
        if value.dim() < -dim or value.shape[dim] == 1:
            return
        if value.shape[dim] != self.rows.count:
            msg["value"] = value.index_select(dim, self.indices[self.rows.example].to(value.device))
        msg["kwargs"] = {**msg["kwargs"], "event_dim": None}
