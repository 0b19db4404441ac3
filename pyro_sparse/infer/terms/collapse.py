"""Sites of the model alone, marked ``infer={"enumerate": "parallel"}``: summed out, whatever serves the guide's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from torch import Tensor

from pyro_sparse._precision import no_autocast
from pyro_sparse.infer.pyro_internals import Frame, common_scale
from pyro_sparse.infer.terms.costs import Term


def enumerated_in_model(model_trace: Any, guide_trace: Any) -> dict[str, Any]:
    """The nodes of the model's own enumerated sites."""
    return {
        name: node
        for name, node in model_trace.nodes.items()
        if node["type"] == "sample" and name not in guide_trace.nodes and "_enumerate_dim" in node["infer"]
    }


def collapsed_terms(model_trace: Any, guide_trace: Any) -> tuple[list[Term], frozenset[str]]:
    r"""
    .. math:: \log \sum_m p(x, z, m)

    for the model's enumerated sites m: a term for each group of factors that share any, and the names of the sites that
    have gone into these. They depend on all draws, as far as is known.

    Raises:
        ValueError: if such a group has several scales.
    """
    enumerated = enumerated_in_model(model_trace, guide_trace)
    if not enumerated:
        return [], frozenset()
    guide_trace.symbolize_dims()
    model_trace.pack_tensors(guide_trace.plate_to_symbol)
    symbols = {node["infer"]["_enumerate_symbol"] for node in enumerated.values()}
    frames: dict[str, Frame] = {}
    factors: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
    scales, gone = [], set()
    for name, node in model_trace.nodes.items():
        if node["type"] != "sample" or "log_prob" not in node["packed"]:
            continue
        if symbols.isdisjoint(node["packed"]["log_prob"]._pyro_dims):
            continue
        own = {model_trace.plate_to_symbol[f.name]: f for f in node["cond_indep_stack"] if f.vectorized}
        frames.update(own)
        factor = node["packed"]["unscaled_log_prob"]
        if name not in enumerated:  # of a masked draw in the model the probabilities still add up to one
            factor = packed.scale_and_mask(factor, mask=node["packed"]["mask"])
        factors.setdefault(frozenset(own), []).append(factor)
        scales.append(node["scale"])
        gone.add(name)
    if not scales:  # each has a single outcome
        return [], frozenset()
    scale = common_scale(scales)
    dims = {**guide_trace.symbol_to_dim, **{symbol: frame.dim for symbol, frame in frames.items()}}
    terms = []
    with no_autocast():
        contracted = contract_tensor_tree(factors, symbols)
    for ordinal, results in contracted.items():
        for result in results:
            value: Tensor = packed.unpack(result, dims) * scale
            own_frames = frozenset(frames[symbol] for symbol in ordinal)
            terms.append(Term(", ".join(enumerated), value, own_frames, value, collapsed=True))
    return terms, frozenset(gone)


def without_collapsed(
    kls: Mapping[str, Tensor], model_trace: Any, guide_trace: Any, required: Collection[str], split: Collection[str]
) -> dict[str, Tensor]:
    """
    The closed-form divergences, but for those to priors that depend on the model's enumerated sites: a sum of such
    priors has none.

    Raises:
        ValueError: naming the site, where one is required, or its own log-probabilities are to be told apart.
    """
    enumerated = enumerated_in_model(model_trace, guide_trace)
    if not enumerated:
        return dict(kls)
    dims = {node["infer"]["_enumerate_dim"] for node in enumerated.values()}

    def depends(value: Tensor) -> bool:
        return any(value.dim() >= -dim and value.shape[dim] > 1 for dim in dims)

    apart = [name for name in split if name in model_trace.nodes and depends(model_trace.nodes[name]["log_prob"])]
    for name in [*apart, *(name for name in required if name in kls and depends(kls[name]))]:
        raise ValueError(
            f"EstimatorELBO, site '{name}': expected a prior that does not depend on {sorted(enumerated)}, which are "
            "summed out in the model, got one that does. Use LeaveOneOut or RaoBlackwell there."
        )
    return {name: kl for name, kl in kls.items() if not depends(kl)}
