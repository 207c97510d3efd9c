"""Predicted classes by name, in one file that an interrupted benchmark resumes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.base.files import atomic_path

_SETTINGS = "settings"


class SavedPredictions:
    """A file of predicted classes, an array per name, that is rewritten whenever one is added.

    Raises: ValueError if the file was made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = json.dumps(settings, sort_keys=True)
        self._arrays: dict[str, NDArray[np.uint8]] = {}
        if path.is_file():
            with np.load(path) as saved:
                if str(saved[_SETTINGS]) != self._settings:
                    raise ValueError(f"{path} has the results of other settings or weights: remove it, or use --out")
                self._arrays = {name: saved[name] for name in saved.files if name != _SETTINGS}

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> NDArray[np.uint8]:
        return self._arrays[name]

    def add(self, **arrays: NDArray[np.uint8]) -> None:
        """Adds arrays and writes the file."""
        self._arrays |= arrays
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as partial, partial.open("wb") as file:
            content: dict[str, Any] = {_SETTINGS: np.array(self._settings), **self._arrays}
            np.savez_compressed(file, **content)
