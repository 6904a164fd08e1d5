"""What an image looks like: p(x)."""
