"""qwen-onnx: from a Qwen checkpoint to an ONNX package that an app team can trust."""

__version__ = "0.1.0"
