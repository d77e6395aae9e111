"""What the models are made of: one idea of the papers per file."""
