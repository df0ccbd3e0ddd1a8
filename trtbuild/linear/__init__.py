"""Linear layers, one file per weight format."""
