"""pytest plugin for timm's tests/test_models.py: our models take the place of timm's in every list of models.

A model is in a list if its baseline's name is, so that timm's filters treat it as timm's models of the same family.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from typing import Any

import timm

import flopeq  # noqa: F401  registers the models
from flopeq.models.variants import baseline_name
from flopeq.registry import MODELS

SIZE = "FLOPEQ_TIMM_SIZE"
"""Environment variable: the size of the models to test."""

TIMM_MODULES = {"vit": "deit", "resmlp": "mlp_mixer", "convnext_iso": "convnext"}


def list_ours(
    filter: str | Sequence[str] = "",
    module: str | Sequence[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = "",
    **kwargs: Any,
) -> list[str]:
    """Our models of one size, for the arguments of `timm.list_models`."""
    return [
        name
        for name, info in MODELS.items()
        if info.size == os.environ[SIZE]
        and timm.models.model_entrypoint(name).__module__.startswith("flopeq.")
        and not pretrained
        and (not module or TIMM_MODULES[info.family] in _as_tuple(module))
        and (not filter or _matches(name, filter))
        and not _matches(name, exclude_filters)
    ]


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(baseline_name(name), pattern) for pattern in _as_tuple(patterns))


def _as_tuple(words: str | Sequence[str]) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) else tuple(words)


def pytest_configure() -> None:
    timm.list_models = list_ours
    timm.list_pretrained = lambda *args, **kwargs: []
