"""Crosscoder model diffing for TransformerLens."""
