"""Load modules from files and save them: the Hub, layouts, names of tensors, reading, saving."""
