"""The command line: `flopeq list | complexity | throughput | profile | equivariance | export | convert`."""

from flopeq.cli import models, profile, throughput  # each registers its commands with `app`
from flopeq.cli.app import app, main

__all__ = ["app", "main", "models", "profile", "throughput"]
