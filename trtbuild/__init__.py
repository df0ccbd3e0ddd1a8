"""Published LLM weights to quantized, sharded TensorRT engines, and their scores."""

__version__ = "0.1.0"
