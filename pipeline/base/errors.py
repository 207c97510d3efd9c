"""Errors that are shown to users, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
from typing import Any


class ConfigError(ValueError):
    """params.yaml is invalid. The message names the field and says what to write instead."""


def did_you_mean(name: str, known: Any) -> str:
    """Returns '; did you mean ...?' with the closest known name, or else a list of the known names if it is short."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; known: {', '.join(known)}" if len(known) <= 12 else ""


class ShardError(ValueError):
    """A shard, an index or the manifest is missing or altered. The message says which, and what to do."""


class SourceError(ValueError):
    """The source cannot be read as images. The message names the file or folder, and says what to do."""


class BusyError(RuntimeError):
    """Another process works on the same files. The message names it."""
