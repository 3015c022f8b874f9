"""Sparse codes: their selection, products and kernels."""
