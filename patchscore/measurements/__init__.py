"""How data come about: p(y | x), and what noise is in an image."""
