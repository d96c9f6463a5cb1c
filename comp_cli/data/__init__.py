"""Image-text pairs, and batches of model inputs made of them."""
