"""Runs: one folder with its settings, models, text, dictionary and results."""
