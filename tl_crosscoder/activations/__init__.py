"""From text to tokens to the paired activations that a crosscoder reads."""
