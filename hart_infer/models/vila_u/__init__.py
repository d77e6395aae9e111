"""VILA-U: one model that reads and draws pictures and video (arXiv:2409.04429)."""
