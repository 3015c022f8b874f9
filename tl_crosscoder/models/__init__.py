"""Models at hook points: sites, loading, tokenizer, and the pair that is compared."""
