"""ONNX graphs: written, run, checked against torch."""
