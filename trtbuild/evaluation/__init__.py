"""Scores: summaries and ROUGE, perplexity, speed, and agreement with the Hugging Face model."""
