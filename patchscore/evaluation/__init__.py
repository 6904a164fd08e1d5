"""What the numbers are measured with."""
