"""Cross-snapshot crosscoders: one dictionary over the activations of several checkpoints."""
