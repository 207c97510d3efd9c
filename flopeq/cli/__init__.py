"""The commands of the command line: models, profile and throughput each register theirs."""

from flopeq.cli import models, profile, throughput  # each registers its commands with `app`
from flopeq.cli.app import app, main

__all__ = ["app", "main", "models", "profile", "throughput"]
