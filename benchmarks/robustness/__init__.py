"""What denoisers lose when the images change: content, scanner, gain, geometry, noise."""
