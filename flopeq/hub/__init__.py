"""Converts the authors' checkpoints, and exports models with a model card."""
