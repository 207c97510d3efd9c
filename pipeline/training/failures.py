"""Notes of trainings that failed, in outputs/<run>/, for the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.base.errors import BusyError
from pipeline.base.files import write_json

FAILURE_FILE = "failed.json"
"""Why the last training of the run failed. What else is in the folder belongs to an earlier training."""


@contextmanager
def note_failure(run_name: str) -> Iterator[None]:
    """Context manager of a training: writes FAILURE_FILE if it fails. An interrupted training has not failed."""
    (_failure_file(run_name)).unlink(missing_ok=True)
    try:
        yield
    except BusyError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        _write(run_name, lines[-1] if lines else type(error).__name__)
        raise


def note_exit(run_name: str, status: int) -> None:
    """Notes the exit status of a training that failed, if it could not note the reason itself."""
    if not _failure_file(run_name).exists():
        _write(run_name, f"its process ended with status {status}")


def _write(run_name: str, message: str) -> None:
    write_json(_failure_file(run_name), {"message": message})


def _failure_file(run_name: str) -> Path:
    return Path("outputs", run_name, FAILURE_FILE)
