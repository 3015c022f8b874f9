"""Publishing: registry, cards, exports and conversion."""
