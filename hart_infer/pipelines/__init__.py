"""What users call: arguments in, pictures out."""
