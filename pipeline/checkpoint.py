"""Checkpoints of one training, in a folder or at a URL that pyarrow opens: whole or not there, a bounded number.

    step-00001250/state.pt              what `loop.Training.state_dict` gives
    step-00001250/<name>.safetensors    the best weights so far of each name
    step-00001250/complete.json         size and checksum of the others, written last

A checkpoint counts when all its files are as `complete.json` says: one that was cut off, while it was written or
later, is passed over for the one before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import pyarrow.fs
import torch
from pyarrow.fs import FileSelector, FileSystem, FileType
from safetensors.torch import load, save
from torch import Tensor

from pipeline.checksum import checksum

Weights = Mapping[str, Tensor]
_COMPLETE, _STATE = "complete.json", "state.pt"
_NAME = re.compile(r"step-\d{8}")
_CHUNK = 8 << 20  # bytes


def open_place(place: str) -> tuple[FileSystem, str]:
    """The file system of a folder or URL, and the path there."""
    if "://" in place:
        return FileSystem.from_uri(place)
    return pyarrow.fs.LocalFileSystem(), str(Path(place).absolute())


class Checkpoints:
    """The checkpoints at a place. One process saves, in a thread of its own; any may load."""

    def __init__(self, place: str, *, keep: int) -> None:
        """Args: keep: newest checkpoints that stay."""
        self.keep = keep
        self._files, self._root = open_place(place)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None
        self.passed_over: dict[str, str] = {}
        """What is wrong with each checkpoint that `newest` passed over."""

    def save(self, step: int, state: Any, best: Mapping[str, Weights]) -> None:
        """Takes a copy of the state now and writes it meanwhile; first waits for the checkpoint before it.

        Raises: OSError if that one could not be written.
        """
        self.wait()
        copied = _copy(state)  # training goes on and changes it; the best weights are copies already
        self._pending = self._thread.submit(self._write, f"step-{step:08d}", copied, dict(best))

    def wait(self) -> None:
        """Returns when everything is written. Raises: OSError if it could not be."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def newest(self) -> str | None:
        """Name of the newest whole checkpoint; those newer than it are `passed_over`. None: there is none."""
        self.passed_over = {}
        for name in reversed(self.names()):
            if (fault := self._fault(name)) is None:
                return name
            self.passed_over[name] = fault
        return None

    def names(self) -> list[str]:
        """Of all that is there, whole or not, in the order of their steps."""
        entries = self._files.get_file_info(FileSelector(self._root, allow_not_found=True))
        return sorted(entry.base_name for entry in entries if _NAME.fullmatch(entry.base_name))

    def load(self, name: str, device: torch.device | str = "cpu") -> tuple[Any, dict[str, dict[str, Tensor]]]:
        """State, on the device, and best weights of a checkpoint."""
        folder = f"{self._root}/{name}"
        with self._files.open_input_file(f"{folder}/{_STATE}") as file:
            state = torch.load(file, map_location=device, weights_only=True)
        best = {}
        for file_name in self._listed(name):
            if file_name.endswith(".safetensors"):
                with self._files.open_input_file(f"{folder}/{file_name}") as file:
                    best[file_name.removesuffix(".safetensors")] = load(file.read())
        return state, best

    def _write(self, name: str, state: Any, best: Mapping[str, Weights]) -> None:
        folder = f"{self._root}/{name}"
        if self._files.get_file_info(folder).type != FileType.NotFound:  # of an attempt that was cut off
            self._files.delete_dir(folder)
        self._files.create_dir(folder, recursive=True)
        listed = {}
        with _Summed(self._files, f"{folder}/{_STATE}") as file:
            torch.save(state, cast(IO[bytes], file))
        listed[_STATE] = file.entry
        for key, weights in best.items():
            with _Summed(self._files, f"{folder}/{key}.safetensors") as file:
                file.write(save(dict(weights)))
            listed[f"{key}.safetensors"] = file.entry
        with self._files.open_output_stream(f"{folder}/{_COMPLETE}") as stream:
            stream.write(json.dumps(listed, indent=1).encode())
        older = [other for other in self.names() if other < name]
        newer = [other for other in self.names() if other > name]  # passed over, else training would have gone on there
        for other in (*newer, *older[: len(older) - self.keep + 1]):
            self._files.delete_dir(f"{self._root}/{other}")

    def _listed(self, name: str) -> dict[str, dict[str, Any]]:
        with self._files.open_input_stream(f"{self._root}/{name}/{_COMPLETE}") as file:
            return json.loads(file.read())

    def _fault(self, name: str) -> str | None:
        """What is wrong with a checkpoint."""
        try:
            listed = self._listed(name)
        except (OSError, ValueError):
            return "it was not written to its end"
        for file_name, entry in listed.items():
            digest, size = checksum(), 0
            try:
                with self._files.open_input_stream(f"{self._root}/{name}/{file_name}") as file:
                    while content := file.read(_CHUNK):
                        digest.update(content)
                        size += len(content)
            except OSError:
                return f"{file_name} is missing"
            if size != entry["size"]:
                return f"{file_name} has {size} bytes, not {entry['size']}"
            if digest.hexdigest() != entry["xxh3"]:
                return f"{file_name} has other contents than were written"
        return None


class _Summed:
    """A new file that knows its size and checksum."""

    def __init__(self, files: FileSystem, path: str) -> None:
        self._stream, self._digest, self._size = files.open_output_stream(path), checksum(), 0

    def __enter__(self) -> _Summed:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, content: Any) -> int:
        num_bytes = memoryview(content).nbytes
        self._stream.write(content)
        self._digest.update(content)
        self._size += num_bytes
        return num_bytes

    def flush(self) -> None:
        """As torch.save asks a file."""
        self._stream.flush()

    @property
    def entry(self) -> dict[str, Any]:
        return {"size": self._size, "xxh3": self._digest.hexdigest()}


def _copy(state: Any) -> Any:
    """The same state in tensors of its own, on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_copy(value) for value in state]
    return state
