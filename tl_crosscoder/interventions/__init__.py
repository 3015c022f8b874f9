"""Edits of activations: patching, ablation, steering, and causal tests with controls."""
