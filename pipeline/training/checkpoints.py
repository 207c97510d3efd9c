"""Checkpoints of one training, in a folder or at a URL that pyarrow can open.

    step-00001250/state.pt              `loop.TrainState.state_dict`
    step-00001250/<name>.safetensors    the best weights so far, one file per name
    step-00001250/complete.json         size and checksum of the other files, written last

A checkpoint is valid if all its files match `complete.json`. A truncated or damaged checkpoint is skipped in favor of
the previous one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, cast

import torch
from pyarrow.fs import FileSelector, FileSystem, FileType
from safetensors.torch import load, save
from torch import Tensor

from pipeline.base.files import new_checksum, open_filesystem

Weights = Mapping[str, Tensor]

_COMPLETE_FILE, _STATE_FILE = "complete.json", "state.pt"

_NAME_PATTERN = re.compile(r"step-\d{8}")

_CHUNK = 8 << 20  # bytes


class CheckpointManager:
    """Saves and loads the checkpoints at a location. One process saves, in a background thread; any may load."""

    def __init__(self, location: str, *, keep: int) -> None:
        """Args: keep: number of latest checkpoints to keep."""
        self.keep = keep
        self._files, self._root = open_filesystem(location)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None
        self.skipped: dict[str, str] = {}
        """Name -> reason, for each checkpoint that `latest` skipped."""

    def save(self, step: int, state: Any, best: Mapping[str, Weights]) -> None:
        """Copies the state now and writes it in the background, after waiting for the previous checkpoint.

        Raises: OSError if the previous checkpoint could not be written.
        """
        self.wait()
        copied = _copy_to_cpu(state)  # training changes it meanwhile; the best weights are copies already
        self._pending = self._thread.submit(self._write, f"step-{step:08d}", copied, dict(best))

    def wait(self) -> None:
        """Waits until everything is written. Raises: OSError if writing failed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def latest(self) -> str | None:
        """Returns the name of the latest valid checkpoint, or None. Newer, damaged ones are listed in `skipped`."""
        self.skipped = {}
        for name in reversed(self.list_names()):
            if (fault := self._find_damage(name)) is None:
                return name
            self.skipped[name] = fault
        return None

    def list_names(self) -> list[str]:
        """Returns the names of all checkpoints, valid or not, in the order of their steps."""
        entries = self._files.get_file_info(FileSelector(self._root, allow_not_found=True))
        return sorted(entry.base_name for entry in entries if _NAME_PATTERN.fullmatch(entry.base_name))

    def load(self, name: str) -> tuple[Any, dict[str, dict[str, Tensor]]]:
        """Returns the state and the best weights of a checkpoint, on the CPU.

        On a GPU, AdamW would read each parameter's step from there at every step, and wait for it.
        """
        folder = f"{self._root}/{name}"
        with self._files.open_input_file(f"{folder}/{_STATE_FILE}") as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
        best = {}
        for file_name in self._read_complete_file(name):
            if file_name.endswith(".safetensors"):
                with self._files.open_input_file(f"{folder}/{file_name}") as file:
                    best[file_name.removesuffix(".safetensors")] = load(file.read())
        return state, best

    def weights_entries(self, name: str) -> dict[str, dict[str, str]]:
        """Returns the file of each of the best weights of a checkpoint, relative to the location, and its checksum."""
        return {
            file_name.removesuffix(".safetensors"): {"file": f"{name}/{file_name}", "xxh3": entry["xxh3"]}
            for file_name, entry in self._read_complete_file(name).items()
            if file_name.endswith(".safetensors")
        }

    def save_weights(self, name: str, weights: Mapping[str, Weights]) -> dict[str, dict[str, str]]:
        """Writes weights without a checkpoint. Returns their `weights_entries`."""
        self._files.create_dir(f"{self._root}/{name}", recursive=True)
        entries = {}
        for key, tensors in weights.items():
            path = f"{name}/{key}.safetensors"
            with _ChecksumFile(self._files, f"{self._root}/{path}") as file:
                file.write(save(dict(tensors)))
            entries[key] = {"file": path, "xxh3": file.entry["xxh3"]}
        return entries

    def _write(self, name: str, state: Any, best: Mapping[str, Weights]) -> None:
        folder = f"{self._root}/{name}"
        if self._files.get_file_info(folder).type != FileType.NotFound:  # left by an interrupted attempt
            self._files.delete_dir(folder)
        self._files.create_dir(folder, recursive=True)
        entries = {}
        with _ChecksumFile(self._files, f"{folder}/{_STATE_FILE}") as file:
            torch.save(state, cast(IO[bytes], file))
        entries[_STATE_FILE] = file.entry
        for key, weights in best.items():
            with _ChecksumFile(self._files, f"{folder}/{key}.safetensors") as file:
                file.write(save(dict(weights)))
            entries[f"{key}.safetensors"] = file.entry
        with self._files.open_output_stream(f"{folder}/{_COMPLETE_FILE}") as stream:
            stream.write(json.dumps(entries, indent=1).encode())
        older = [other for other in self.list_names() if other < name]
        newer = [
            other for other in self.list_names() if other > name
        ]  # skipped ones, or training would have resumed from them
        for other in (*newer, *older[: len(older) - self.keep + 1]):
            self._files.delete_dir(f"{self._root}/{other}")

    def _read_complete_file(self, name: str) -> dict[str, dict[str, Any]]:
        with self._files.open_input_stream(f"{self._root}/{name}/{_COMPLETE_FILE}") as file:
            return json.loads(file.read())

    def _find_damage(self, name: str) -> str | None:
        """Returns what is wrong with a checkpoint, or None."""
        try:
            entries = self._read_complete_file(name)
        except (OSError, ValueError):
            return "it was not written completely"
        for file_name, entry in entries.items():
            digest, size = new_checksum(), 0
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
                return f"{file_name} does not match its checksum"
        return None


class _ChecksumFile:
    """A new file that records its size and checksum."""

    def __init__(self, files: FileSystem, path: str) -> None:
        self._stream, self._digest, self._size = files.open_output_stream(path), new_checksum(), 0

    def __enter__(self) -> _ChecksumFile:
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
        """torch.save calls this."""
        self._stream.flush()

    @property
    def entry(self) -> dict[str, Any]:
        return {"size": self._size, "xxh3": self._digest.hexdigest()}


def _copy_to_cpu(state: Any) -> Any:
    """Returns a copy of the state with its tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copy_to_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_copy_to_cpu(value) for value in state]
    return state
