"""What models are for: their outputs, metrics, and how far a compact model strays from the dense one."""
