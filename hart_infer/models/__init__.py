"""Networks only, named as the papers name them."""
