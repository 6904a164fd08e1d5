"""The noisy image itself -> a better prior, and how unlike the training images it is."""
