"""The dictionary: one sparse code over the activations of several sites."""
