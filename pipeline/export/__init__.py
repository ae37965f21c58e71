"""From a checkpoint to ONNX graphs."""
