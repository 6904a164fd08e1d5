"""From a measurement to images: posteriors, estimates, samples, and how far they can be trusted."""
