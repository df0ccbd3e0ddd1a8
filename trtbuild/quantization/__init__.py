"""From a checkpoint and a recipe to quantized tensors."""
