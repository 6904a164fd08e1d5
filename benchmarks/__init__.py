"""Measurements of the library: how well it denoises, and how fast. Run ``python -m benchmarks``."""
