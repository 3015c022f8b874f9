"""Figures, token panels and the HTML report."""
