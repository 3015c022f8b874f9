"""Names of latents from a language model, and how well the names tell where latents are active."""
