"""Plain words for metrics and places: what a reader sees who does not know our names."""

import re

PLAIN = {
    "loss": "loss",
    "rankme_cov": "effective rank of the activations",
    "rankme": "effective rank of the activations, uncentred",
    "alpha_req": "steepness of the activations' spectrum",
    "top1_over_median": "largest activation over the median one",
    "l1": "sum of a weight matrix's magnitudes",
    "l2": "norm of a weight matrix",
    "l1_over_l2": "spread of a weight matrix's magnitudes",
    "spectral_norm": "largest singular value of a weight matrix",
    "weight_var": "variance of the weights",
    "weight_mean": "mean of the weights",
    "stable_rank": "stable rank of a weight matrix",
    "effective_rank": "effective rank of a weight matrix",
    "attention_entropy": "spread of attention",
    "prefix_matching": "induction score",
    "repeat_previous_token": "previous-token score",
    "sink_mass_0": "attention to the first token",
    "local_dimension_mean": "local dimension of the activations",
}
# Without a place their value is a mean over matrices, and not that of all weights together.
_OF_A_MATRIX = {"l1", "l2", "l1_over_l2", "spectral_norm", "stable_rank", "effective_rank"}
_NAME = re.compile(r"(?P<metric>[^\[]+)(\[(?P<site>[\w.]+?)(\.(?P<layer>\d+|last|mean|min|max))?\])?")
_OVER = {"mean": "mean", "min": "least", "max": "largest"}


def in_words(name: str) -> str | None:
    """``effective rank of the activations after block 3`` of ``rankme_cov[resid_post.3]``.

    None where we have no words for the metric.
    """
    found = _NAME.fullmatch(name)
    plain = PLAIN.get(found["metric"]) if found else None
    if found is None or plain is None:
        return None
    if found["site"] is None and found["metric"] in _OF_A_MATRIX:
        return f"{plain} (mean over the matrices)"
    place = _place(found["site"], found["layer"])
    return f"{plain} {place}" if place else plain


def _place(site: str | None, layer: str | None) -> str:
    if site is None:
        return ""
    if site == "final_norm":
        return "after the final norm"
    if layer in _OVER:
        return f"({_OVER[layer]} over the blocks)"
    block = "" if layer is None else "the last block" if layer == "last" else f"block {layer}"
    if site == "resid_post" and block:
        return f"after {block}"
    return f"at {site}" + (f" of {block}" if block else "")
