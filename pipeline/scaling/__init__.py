"""The scaling study: how networks compare as compute, model size and data grow.

In: `scaling` of params.yaml. Out: `scaling/`: a row per training, the losses of every validation image, fits, figures.
This file imports nothing: a study is refitted without torch and Ray.
"""
