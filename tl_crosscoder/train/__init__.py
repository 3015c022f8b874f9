"""Training: presets, trainer, checkpoints and metrics."""
