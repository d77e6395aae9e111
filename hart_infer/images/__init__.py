"""Convert pictures between tensors, PIL and files."""
