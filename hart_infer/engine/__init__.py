"""How a model is executed: what it keeps between calls, and between scales."""
