"""The experiment: every method on every organism, judged by what it causes, with its nulls."""
