"""From a pair and a text to a trained dictionary on disk."""
