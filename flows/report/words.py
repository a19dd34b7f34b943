"""Plain words for metrics and places: what a reader sees who does not know our names."""

import re

_SINCE = {
    "first": "the run's first checkpoint",
    "previous": "the checkpoint before",
    "last": "the run's last checkpoint",
}
_RANKS = {
    "32_128": "directions 32 to 128",
    "128_512": "directions 128 to 512",
    "512_d": "direction 512 and all smaller ones",
}
_LARGEST = {"top1": "largest", "top2": "second largest", "top3": "third largest"}

_SPECTRA = {
    "rankme_cov": "effective rank of the activations",
    "rankme": "effective rank of the activations, uncentred",
    "rankme_cov_top2048": "effective rank of the activations, largest 2048 directions",
    **{
        f"rankme_cov_minus_{k}": f"effective rank of the activations without their {k} largest directions"
        for k in (2, 8, 32)
    },
    "rankme_cov_minus_1": "effective rank of the activations without their largest direction",
    "rankme_cov_richardson": "effective rank of the activations, corrected for the sample's size by halves",
    "rankme_cov_plugin": "effective rank of the activations, corrected for the sample's size by a formula",
    "rankme_cov_half_error": "error of the effective rank of the activations, from two halves",
    "participation_ratio": "number of directions that the activations fill (participation ratio)",
    "participation_ratio_richardson": "participation ratio of the activations, corrected for sample size",
    "participation_ratio_half_error": "error of the participation ratio of the activations, from two halves",
    "matrix_entropy": "diversity of the activations over all tokens (entropy of their Gram matrix)",
    "matrix_entropy_patches": "diversity of the activations within short stretches of text",
    "alpha_req": "steepness of the activations' spectrum",
    "alpha_req_r2": "how straight the activations' spectrum is (R2 of its steepness)",
    "alpha_req_richardson": "steepness of the activations' spectrum, corrected for the sample's size",
    "alpha_req_half_error": "error of the steepness of the activations' spectrum, from two halves",
    **{f"alpha_req_{k}": f"steepness of the activations' spectrum, {where}" for k, where in _RANKS.items()},
    **{
        f"alpha_req_{k}_r2": f"how straight the activations' spectrum is, {where}"
        for k, where in _RANKS.items()
    },
    "local_dimension_mean": "local dimension of the activations",
    "local_dimension_q05": "local dimension of the activations, lowest 5 % of tokens",
    "local_dimension_q50": "local dimension of the activations, middle token",
    "local_dimension_q95": "local dimension of the activations, highest 5 % of tokens",
    "twonn_dimension": "dimension of the activations as one cloud of points",
    "duplicate_share": "share of tokens whose activations repeat those of another",
}

_ACTIVATIONS = {
    **{name: f"{size} activation" for name, size in _LARGEST.items()},
    "median": "median activation",
    "top1_over_median": "largest activation over the median one",
    "top1_over_median_of_means": "mean largest activation over the mean median one",
    "massive_count": "number of massive activations in a sequence",
    **{f"{name}_channel": f"channel of the {size} activation" for name, size in _LARGEST.items()},
    **{
        f"{name}_channel_share": f"share of sequences with the {size} activation at that channel"
        for name, size in _LARGEST.items()
    },
    **{f"{name}_position": f"position of the {size} activation" for name, size in _LARGEST.items()},
    **{
        f"{name}_position_share": f"share of sequences with the {size} activation at that position"
        for name, size in _LARGEST.items()
    },
    "rms": "typical size of the activations (root mean square)",
    "top_channel_energy_share": "share of the activations' energy in the strongest channel",
    "top_channels_energy_share": "share of the activations' energy in the strongest channels",
    "rms_growth": "growth of the activations from block to block",
    "rms_last_over_embedding": "growth of the activations from the embedding to the last block",
    **{
        f"top_channels_overlap_{k}": f"overlap of the strongest channels with those of {when}"
        for k, when in _SINCE.items()
    },
}

_CHANGES = {
    **{f"cka_{k}": f"likeness of the activations to those of {when} (CKA)" for k, when in _SINCE.items()},
    **{
        f"cka_debiased_{k}": f"likeness of the activations to those of {when} (CKA without bias)"
        for k, when in _SINCE.items()
    },
    **{
        f"rotation_{k}": f"turn of the largest directions of the activations since {when}"
        if k != "last"
        else f"turn of the largest directions of the activations until {when}"
        for k, when in _SINCE.items()
    },
    **{f"weight_distance_{k}": f"distance of the weights from {when}" for k, when in _SINCE.items()},
    **{
        f"weight_relative_distance_{k}": f"distance of the weights from {when}, over their size there"
        for k, when in _SINCE.items()
    },
    **{f"weight_cosine_{k}": f"cosine of the weights to those of {when}" for k, when in _SINCE.items()},
}

_ATTENTION = {
    "attention_entropy": "spread of attention",
    "attention_entropy_normalised": "spread of attention, of the most possible",
    "attention_collapsed_share": "share of tokens whose attention is on almost one token",
    "attention_max_logit": "largest attention logit",
    "attention_log_sum_exp": "level of the attention logits (log-sum-exp)",
    "attention_previous_token": "attention to the token before",
    "attention_duplicate_token": "attention to earlier copies of the token",
    "prefix_matching": "induction score",
    "repeat_duplicate_token": "duplicate-token score",
    "repeat_previous_token": "previous-token score",
    "ov_copying": "copying score of a head",
    "is_induction_head": "share of induction heads",
    "is_duplicate_token_head": "share of duplicate-token heads",
    "is_previous_token_head": "share of previous-token heads",
    "induction_heads": "number of induction heads",
    "duplicate_token_heads": "number of duplicate-token heads",
    "previous_token_heads": "number of previous-token heads",
    "sink_mass_0": "attention to the first token",
    "sink_mass_1": "attention to the second token",
    "sink_mass_2": "attention to the third token",
    "sink_mass_3": "attention to the fourth token",
    "sink_mass_top": "attention to the most attended token",
    "sink_is_top": "share of sequences whose most attended token is the sink token",
    "sink_rate": "share of sequences with an attention sink",
    "dormant_share": "share of sequences in which a head rests on the sink token",
    "sink_value_norm": "what a head adds for the sink token",
    "sink_value_ratio": "what a head adds for the sink token over that for other tokens",
    "sink_residual_norm": "size of the sink token's activations",
    "sink_residual_ratio": "size of the sink token's activations over that of other tokens",
}

_PREDICTIONS = {
    "loss": "loss",
    "repeat_loss_first": "loss on random tokens, the first time",
    "repeat_loss_second": "loss on random tokens, when they repeat",
    "repeat_loss_gain": "gain in loss when random tokens repeat",
    "log_z": "level of the output logits (log Z)",
    "log_z_squared": "squared level of the output logits (z-loss)",
    "logit_max": "largest output logit",
    "logit_rms": "typical size of the output logits",
    "in_context_score": "loss late in the text less that early in it (at two tokens)",
    "in_context_score_relative": "loss late in the text less that early in it (over two parts)",
    "unigram_kl": "distance of the predictions from the frequencies of tokens",
    "bigram_kl": "distance of the predictions from the frequencies of pairs of tokens",
}

_OF_A_MATRIX = {
    "l1": "sum of a weight matrix's magnitudes",
    "l2": "norm of a weight matrix",
    "l1_over_l2": "spread of a weight matrix's magnitudes",
    "trace": "trace of a weight matrix",
    "spectral_norm": "largest singular value of a weight matrix",
    "trace_over_spectral_norm": "trace of a weight matrix over its largest singular value",
    "singular_mean": "mean singular value of a weight matrix",
    "singular_var": "variance of a weight matrix's singular values",
    "stable_rank": "stable rank of a weight matrix",
    "effective_rank": "effective rank of a weight matrix",
    "weight_alpha": "steepness of a weight matrix's spectrum (power law)",
    "weight_alpha_ks": "misfit of that power law to a weight matrix's spectrum",
    "weight_alpha_xmin": "where the power law of a weight matrix's spectrum begins",
    "gg_shape": "shape of the distribution of a matrix's weights (2: Gaussian, 1: Laplace)",
    "gg_scale": "width of the distribution of a matrix's weights",
    "weight_kurtosis": "heaviness of the tails of a matrix's weights",
}

_WEIGHTS = {
    **_OF_A_MATRIX,
    "weight_mean": "mean of the weights",
    "weight_median": "median of the weights",
    "weight_var": "variance of the weights",
    "bias_mean": "mean of the biases",
    "bias_median": "median of the biases",
    "bias_var": "variance of the biases",
    "model_layers": "number of blocks",
    "model_width": "width of the model",
    "model_heads": "number of attention heads in a block",
    "model_d_ff": "width of the MLP",
}

_FEATURES = {
    "crosscoder_explained_variance": "share of the activations' variance that the crosscoder explains",
    "crosscoder_l0": "features active at a token",
    "feature_strength": "mean strength of features, of their largest",
    "feature_scaling": "how strongly the activations hold the features",
    "feature_alive_share": "share of features that are alive",
    "feature_births": "features born",
    "feature_births_per_step": "features born per step",
    "feature_deaths": "features that died",
    "feature_turns": "features that turned",
    "feature_previous_cosine": "cosine of features to those at the snapshot before",
    "feature_final_cosine": "cosine of features to those at the last snapshot",
    "feature_dimensionality": "share of the space that features fill",
}

_TRAINING = {
    "train_loss": "loss that the training logged",
    "train_lr": "learning rate",
    "train_grad_norm": "norm of the gradient",
    "train_eval_loss": "loss on the training's own evaluation set",
}

# Every metric of docs/metrics.md; tests hold it to that.
PLAIN = {
    **_PREDICTIONS,
    **_SPECTRA,
    **_ACTIVATIONS,
    **_CHANGES,
    **_ATTENTION,
    **_WEIGHTS,
    **_FEATURES,
    **_TRAINING,
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
    if found["site"] is None and found["metric"] in _OF_A_MATRIX:
        # Without a place the value is a mean over matrices, and not that of all weights together.
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
