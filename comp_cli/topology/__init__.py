"""Shapes of models, and what each can do."""
