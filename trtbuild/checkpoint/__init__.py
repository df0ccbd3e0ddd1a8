"""Weights from wherever they are published, in one canonical form: Hugging Face LLaMA names in safetensors."""
