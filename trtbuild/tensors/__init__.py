"""Tensors before they are read, quantized weights, rounding, and safetensors files: the ground floor."""
