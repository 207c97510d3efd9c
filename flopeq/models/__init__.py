"""One file for each family, what they share, and building a model by name."""
