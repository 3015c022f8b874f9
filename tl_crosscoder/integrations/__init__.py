"""Hand-off to other tools, and names from a language model."""
