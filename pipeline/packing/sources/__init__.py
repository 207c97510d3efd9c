"""Source layouts. Each lists its images as one table and extracts nothing.

Reads a path. Returns a `Listing`, or `ExistingShards`.
"""
