"""What needs no dictionary: the comparison that a dictionary has to win."""
