"""A language model as judge: it names latents, and its names are scored by detection."""
