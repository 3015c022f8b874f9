"""Training by several processes: the same dictionary, its tokens and its latents shared out."""
