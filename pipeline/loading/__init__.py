"""Loads batches from shards: order, reading, decoding, augmentation.

Reads `Shards` and a recipe. Yields batches of tensors, in an order that is a pure function of seed, epoch and rank.
"""
