"""Checkpoint folders: where they come from, whether they can be trusted, loading, writing."""
