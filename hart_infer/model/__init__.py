"""The model: one idea of the paper per file."""
