"""From images to a prior."""
