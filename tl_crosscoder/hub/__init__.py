"""Dictionaries that leave this package and come to it: published, exported, imported."""
