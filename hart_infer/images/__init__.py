"""Pictures between tensors, PIL and files."""
