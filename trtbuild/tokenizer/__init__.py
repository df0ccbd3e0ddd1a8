"""Tokenizers from every published format, and chat templates."""
