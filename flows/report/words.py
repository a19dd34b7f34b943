"""Plain words for metrics and places: what a reader sees who does not know our names."""

import re

PLAIN = {
    "loss": "loss",
    "rankme_cov": "effective rank of the activations",
    "rankme": "effective rank of the activations, uncentred",
    "alpha_req": "steepness of the activations' spectrum",
    "top1_over_median": "largest activation over the median one",
    "l1": "sum of the weights' magnitudes",
    "l2": "norm of the weights",
    "l1_over_l2": "spread of the weights' magnitudes",
    "spectral_norm": "largest singular value of the weights",
    "weight_var": "variance of the weights",
    "weight_mean": "mean of the weights",
    "stable_rank": "stable rank of the weights",
    "effective_rank": "effective rank of the weights",
    "attention_entropy": "spread of attention",
    "prefix_matching": "induction score",
    "repeat_previous_token": "previous-token score",
    "sink_mass_0": "attention to the first token",
    "local_dimension_mean": "local dimension of the activations",
}
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
