"""The dictionary: inference, sparsity, partitions, loss and the training step."""
