"""ONNX graphs whose weights stay on disk: written and edited."""
