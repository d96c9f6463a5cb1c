"""A dense model, opened and described."""
