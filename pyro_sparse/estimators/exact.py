"""The sum over all outcomes of a site, or over the ones that have probability."""

from __future__ import annotations

from torch import Tensor

from pyro_sparse.estimators.base import Enumeration, Estimator, Gather, Site, Slots, require_outcomes

MODES = ("padded", "union", "packed", "auto")


class Exact(Estimator):
    r"""
    .. math:: \nabla E_q f = \sum_{z\,:\,q(z) > 0} q(z)\,f(z)\,\nabla \log q(z)

    **Bias:** none, and no variance of its own. **Extra model evaluations:** one per outcome; where the distribution
    has a sparse support, one per outcome with positive probability. **Needs from the guide:** a finite support.

    Args:
        mode: how a sparse support is laid out for the model: ``"padded"``, ``"union"``, ``"packed"`` or ``"auto"``, as
            :class:`~pyro_sparse.infer.SparseEnumELBO` describes them. Packed sites share one plate, and their options.
            Beside a closed-form KL divergence, or another site with ``"packed"``, ``"auto"`` packs none.
        max_support: refuse a batch in which one example's support is larger.
        chunk_rows: in mode ``"packed"``: on how many rows the model runs at a time.
        gather: in modes ``"packed"`` and ``"auto"``: places arguments; see :class:`~pyro_sparse.infer.SparseEnumELBO`.
        check: in mode ``"packed"``: whether the first run under Pyro's validation is compared with an ordinary one.

    Raises:
        ValueError: for an unknown mode, a ``max_support`` or ``chunk_rows`` below one, or options of mode
            ``"packed"`` in another.
    """

    def __init__(
        self,
        mode: str = "padded",
        *,
        max_support: int | None = None,
        chunk_rows: int | None = None,
        gather: Gather | None = None,
        check: bool = True,
    ) -> None:
        super().__init__()
        check_expansion("Exact", MODES, mode, max_support, chunk_rows, gather)
        self.mode = mode
        self.max_support = max_support
        self.chunk_rows = chunk_rows
        self.gather = gather
        self.check = check

    @property
    def enumeration(self) -> Enumeration:
        """Its options."""
        return Enumeration(self.mode, self.max_support, self.chunk_rows, self.gather, self.check)

    def draw(self, site: Site) -> Slots:
        """All outcomes. (An ELBO lays out a sparse support, where there is one, in place of this.)"""
        require_outcomes("Exact", site)
        outcomes = site.fn.enumerate_support(expand=False)
        return Slots(outcomes, site.fn.log_prob(outcomes).detach(), len(outcomes))

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        weights = site.log_prob.detach().exp()
        return (weights * cost * site.log_prob).masked_fill(weights == 0, 0.0), 0.0


def check_expansion(
    owner: str,
    modes: tuple[str, ...],
    mode: str,
    max_support: int | None,
    chunk_rows: int | None,
    gather: Gather | None,
) -> None:
    """Raises for options of an expansion that mean nothing."""
    if mode not in modes:
        raise ValueError(f"{owner}: expected mode in {modes}, got {mode!r}. Use one of them.")
    if max_support is not None and max_support < 1:
        raise ValueError(f"{owner}: expected max_support >= 1 or None, got {max_support}. Raise it.")
    if chunk_rows is not None and mode != "packed":
        raise ValueError(f"{owner}: expected chunk_rows with mode='packed', got it with {mode!r}. Leave it out.")
    if gather is not None and mode not in ("packed", "auto"):
        raise ValueError(f"{owner}: expected gather with mode='packed' or 'auto', got it with {mode!r}. Leave it out.")
    if chunk_rows is not None and (type(chunk_rows) is not int or chunk_rows < 1):
        raise ValueError(f"{owner}: expected chunk_rows of at least 1, got {chunk_rows!r}. Give a number of rows.")
    if gather is not None and not callable(gather):
        raise TypeError(f"{owner}.gather: expected a function (index, *args, **kwargs), got {gather!r}. Give one.")
