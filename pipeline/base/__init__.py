"""Shared foundations: typed models of params.yaml, errors, files, checksums, progress bars, figure style.

Reads params.yaml into an `Experiment`. Nothing here depends on shards, training or reports.
"""
