"""Building a model by name, with messages for people when a name or an argument is wrong."""

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
    """A model or an argument that does not exist; the message names the nearest that does."""


def build(name: str, device: torch.device | str = "cpu", **args: Any) -> nn.Module:
    """The untrained model of that name in timm's registry.

    On the meta device it has shapes but no weights, at no cost in time or memory.
    Raises: ModelError for an unknown name, an unknown argument, or a value that the model does not take.
    """
    if not timm.is_model(name):
        raise ModelError(f"unknown model {name!r}{nearest(name, timm.list_models())}")
    try:
        with torch.device(device):
            return timm.create_model(name, **args)
    except TypeError as error:
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise ModelError(f"{name} does not take {args}: {error}") from error
        known = _arguments(name, unknown[1])
        raise ModelError(f"{name} takes no argument {unknown[2]!r}{nearest(unknown[2], known)}") from None
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ModelError(f"{name} does not take {args}: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" for the nearest known name, or nothing when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _arguments(name: str, class_name: str) -> list[str]:
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
