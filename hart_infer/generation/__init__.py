"""The loops over scales, and their data."""
