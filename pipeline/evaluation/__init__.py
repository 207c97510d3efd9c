"""Evaluates weights on validation sets.

In: `outputs/<run>/weights.safetensors`. Out: `outputs/<run>/metrics.json`.
"""
