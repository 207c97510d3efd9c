"""Counts the operations of a model. Re-exports `flopeq.measure.flops`."""

from flopeq.measure.flops import Complexity, complexity

__all__ = ["Complexity", "complexity"]
