"""The folders of a run: its checkpoints, its status file, what it was made from, and Ray's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.base.config import Experiment
from pipeline.base.files import open_filesystem, read_json, write_json
from pipeline.training.fingerprint import describe_differences

RAY_RUN_PREFIX = "ray-"


@dataclass(frozen=True)
class RunDirectory:
    """Folders of one configuration of a run: `storage` for checkpoints, `local_dir` (always local) for its status.

    Configurations are told apart by their fingerprint. Starting one leaves the others as they are.
    """

    fingerprint: str
    storage: str
    local_dir: Path

    @classmethod
    def for_run(cls, experiment: Experiment, run_name: str, fingerprint: str) -> RunDirectory:
        base = experiment.storage if "://" in experiment.storage else str(Path(experiment.storage).absolute())
        local_root = Path("outputs", run_name, "checkpoints").absolute()
        return cls(fingerprint, f"{base}/{run_name}/checkpoints/{fingerprint}", local_root / fingerprint)

    @property
    def checkpoints_location(self) -> str:
        """Folder or URL of the checkpoints of this configuration."""
        return f"{self.storage}/steps"

    @property
    def stop_file(self) -> str:
        """A file that requests the workers to stop."""
        return f"{self.storage}/stop"

    @property
    def lock_file(self) -> Path:
        """The file that a process locks while it trains the run, in any configuration."""
        return self.local_dir.parent / "lock"

    @property
    def report_log(self) -> Path:
        """The file through which the driver receives the workers' reports."""
        return self.local_dir / "journal.jsonl"

    def resume_or_create(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the saved status of this configuration, or {}. Keeps what it is made from for later comparisons."""
        files, root = open_filesystem(self.storage)
        files.create_dir(root, recursive=True)
        self.cleanup()
        self.save("inputs", inputs)
        return self.load("run")

    def list_configurations(self) -> list[RunDirectory]:
        """Returns every configuration of the run that left something, the most recently used first."""
        from pyarrow.fs import FileSelector, FileType

        last_used: dict[str, float] = {}
        for location in (self.storage, str(self.local_dir)):
            files, folder = open_filesystem(location)
            parent = FileSelector(str(PurePosixPath(folder).parent), allow_not_found=True)
            for entry in files.get_file_info(parent):
                if entry.type == FileType.Directory:
                    last_used.setdefault(entry.base_name, 0)
                    status = self._sibling(entry.base_name).local_dir / "inputs.json"
                    if status.is_file():
                        last_used[entry.base_name] = status.stat().st_mtime
        return [self._sibling(name) for name in sorted(last_used, key=lambda name: (-last_used[name], name))]

    def _sibling(self, fingerprint: str) -> RunDirectory:
        storage = f"{self.storage.rpartition('/')[0]}/{fingerprint}"
        return replace(self, fingerprint=fingerprint, storage=storage, local_dir=self.local_dir.parent / fingerprint)

    def list_checkpoints(self) -> list[str]:
        """Returns the names of the checkpoints, valid or not, in the order of their steps."""
        from pyarrow.fs import FileSelector

        files, root = open_filesystem(self.checkpoints_location)
        names = [entry.base_name for entry in files.get_file_info(FileSelector(root, allow_not_found=True))]
        return sorted(name for name in names if name.startswith("step-"))

    def request_stop(self) -> None:
        """Creates the file that requests the workers to stop."""
        files, path = open_filesystem(self.stop_file)
        files.open_output_stream(path).close()

    def load(self, name: str) -> dict[str, Any]:
        """Returns the content of `<name>.json`, or {}.

        `run` has the MLflow run and the status, `inputs` what the fingerprint is computed from, `outcome` what a
        finished or diverged training reached, `adopted` the configuration whose checkpoint it started from.
        """
        return read_json(self.local_dir / f"{name}.json", {})

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes `<name>.json`."""
        write_json(self.local_dir / f"{name}.json", content)

    def save_status(self, mlflow_run_id: str, status: str, *, is_tracked: bool = False) -> None:
        """Saves the MLflow run of the training, its status, and whether MLflow has its outcome."""
        self.save("run", {"mlflow_run_id": mlflow_run_id, "status": status, "is_tracked": is_tracked})

    def differences(self, inputs: Mapping[str, Any]) -> list[str]:
        """Returns a phrase for every input of this configuration that differs from these inputs."""
        own = self.load("inputs")
        return describe_differences(own, inputs) if own else ["it does not say what it was made from"]

    def delete(self) -> None:
        """Deletes all files of this configuration."""
        from pyarrow.fs import FileType

        for location in (self.storage, str(self.local_dir)):
            files, folder = open_filesystem(location)
            if files.get_file_info(folder).type == FileType.Directory:
                files.delete_dir(folder)

    def num_bytes(self) -> int:
        """Returns the size of all files of this configuration."""
        return sum(size for location in {self.storage, str(self.local_dir)} for size in _file_sizes(location))

    def cleanup(self) -> None:
        """Removes Ray's own files, which nothing reads, and the stop file."""
        from pyarrow.fs import FileSelector

        files, root = open_filesystem(self.storage)
        for entry in files.get_file_info(FileSelector(root, allow_not_found=True)):
            if entry.base_name.startswith(RAY_RUN_PREFIX):
                files.delete_dir(entry.path)
            elif entry.base_name == PurePosixPath(self.stop_file).name:
                files.delete_file(entry.path)


def _file_sizes(location: str) -> Iterator[int]:
    from pyarrow.fs import FileSelector

    files, folder = open_filesystem(location)
    for entry in files.get_file_info(FileSelector(folder, recursive=True, allow_not_found=True)):
        yield entry.size or 0
