"""Sweeps over recipes and split points, with trials on Ray Tune.

In: `sweeps` of params.yaml. Out: `sweeps/{recipe,hybrid}/`, and recipes with tuned values.
This file imports nothing: Tune's controller imports `trial` and must not load torch.
"""
