"""The one decoder, and which part of it a rank holds."""
