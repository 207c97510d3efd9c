"""The folders of a run: its checkpoints, its status file and Ray's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pyarrow.fs import FileSelector, FileType, LocalFileSystem

from pipeline.base.config import Experiment
from pipeline.base.files import read_json, write_json
from pipeline.training.checkpoints import open_filesystem

RAY_RUN_PREFIX = "ray-"


@dataclass(frozen=True)
class RunDirectory:
    """Folders of one configuration of a run: `storage` for checkpoints, `local_dir` (always local) for its status."""

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

    def resume_or_create(self) -> dict[str, str]:
        """Returns the saved status of this configuration, or {}. Removes the files of other configurations."""
        files, root = open_filesystem(self.storage)
        for system, folder in ((files, root), (LocalFileSystem(), str(self.local_dir))):
            parent = str(PurePosixPath(folder).parent)
            for entry in system.get_file_info(FileSelector(parent, allow_not_found=True)):
                if entry.type == FileType.Directory and entry.base_name != self.fingerprint:
                    system.delete_dir(entry.path)
        files.create_dir(root, recursive=True)
        self.cleanup()
        return read_json(self.local_dir / "run.json", {})

    def request_stop(self) -> None:
        """Creates the file that requests the workers to stop."""
        files, path = open_filesystem(self.stop_file)
        files.open_output_stream(path).close()

    def save_status(self, mlflow_run_id: str, status: str) -> None:
        """Saves the status of the training and its MLflow run."""
        write_json(self.local_dir / "run.json", {"mlflow_run_id": mlflow_run_id, "status": status})

    def cleanup(self) -> None:
        """Removes Ray's own files, which nothing reads, and the stop file."""
        files, root = open_filesystem(self.storage)
        for entry in files.get_file_info(FileSelector(root, allow_not_found=True)):
            if entry.base_name.startswith(RAY_RUN_PREFIX):
                files.delete_dir(entry.path)
            elif entry.base_name == PurePosixPath(self.stop_file).name:
                files.delete_file(entry.path)
