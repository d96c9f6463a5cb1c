"""Importance, schedule, FLOPs, slicing: how a dense model becomes a plan, and a plan a compact model."""
