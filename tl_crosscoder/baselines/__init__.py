"""Methods that need no dictionary."""
