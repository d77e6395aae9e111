"""Files to modules and back: the Hub, layouts, names of tensors, reading, saving."""
