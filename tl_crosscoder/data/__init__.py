"""From text to tokens to activations: documents, chats, mixtures, caches and batches."""
