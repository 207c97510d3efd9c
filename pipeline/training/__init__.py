"""Trains one run: the training loop of one worker, checkpoints, and Ray Train around them.

In: a run's resolved settings and shards. Out: `outputs/<run>/`.
This file imports nothing: Ray's controller imports `report_log` and must not load torch.
"""
