"""Pure measurement: what a crosscoder explains, and which latents belong to the fine-tune."""
