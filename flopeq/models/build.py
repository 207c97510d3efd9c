"""Builds a model by name, with a helpful message for a wrong name or argument."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import nn


class ModelError(ValueError):
    """Raised for an unknown model or argument. The message names the closest known one."""


def build(name: str, device: torch.device | str = "cpu", **args: Any) -> nn.Module:
    """Builds the untrained model of that name in timm's registry.

    On the meta device the model has shapes but no weights, and costs no time or memory.
    Raises: ModelError for an unknown name, an unknown argument, or an invalid value.
    """
    if not timm.is_model(name):
        raise ModelError(f"unknown model {name!r}{did_you_mean(name, timm.list_models())}")
    try:
        with torch.device(device):
            return timm.create_model(name, **args)
    except TypeError as error:
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise ModelError(f"{name} does not take {args}: {error}") from error
        known = _keyword_arguments(name, unknown[1])
        raise ModelError(f"{name} takes no argument {unknown[2]!r}{did_you_mean(unknown[2], known)}") from None
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ModelError(f"{name} does not take {args}: {error}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The suffix "; did you mean ...?" with the closest known name, or "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _keyword_arguments(name: str, class_name: str) -> list[str]:
    """Keyword arguments of a registered model whose class has the given name."""
    entrypoint = timm.models.model_entrypoint(name)
    built = getattr(sys.modules[entrypoint.__module__], class_name, None)
    sources = [entrypoint, *(cls.__init__ for cls in (built.__mro__ if built else ()))]
    return [
        parameter.name
        for source in sources
        for parameter in inspect.signature(source).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
