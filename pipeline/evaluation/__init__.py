"""Evaluates weights on validation sets.

In: `outputs/<run>/weights.safetensors`. Out: `outputs/<run>/metrics.json` and `predictions.parquet`. Also the
intervals and paired comparisons that the report makes of them.
"""
