"""To look at: figures and terminal tables."""
