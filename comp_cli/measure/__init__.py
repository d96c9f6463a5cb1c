"""Latency, memory and gates."""
