"""A diff live in a notebook."""
