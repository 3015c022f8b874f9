"""Measures that need no edit of a model: reconstruction, norms, Latent Scaling, examples."""
