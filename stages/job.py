"""Runs a stage in a folder that outlives the job: `python -m stages.job <folder> <stage> [words ...]`.

The working directory of a Ray job is a temporary copy of the code. This stage copies the code into the folder, which
must be on a disk that all nodes mount at the same path, and runs there. The folder keeps the results: data, outputs,
reports, dvc.lock, mlflow.db. The next job with the same folder continues from them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from pipeline.base import locks
from pipeline.base.errors import ConfigError
from stages import run_stage

CODE = ("flopeq", "pipeline", "presets", "stages", "dvc.yaml", "params.yaml")
"""The code that stages need. Ray uploads only what git and .rayignore allow."""


def run(folder: str, stage: str, *words: str) -> None:
    """Exits with the stage's status. Raises: ConfigError for an unknown stage, BusyError while
    another job runs there."""
    if importlib.util.find_spec(f"stages.{stage}") is None:
        known = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
        raise ConfigError(f"no stage named {stage!r}; known: {', '.join(known)}")
    target = Path(folder).absolute()
    lock = locks.acquire_lock(target / ".job", str(target))
    if target != Path.cwd():
        copy_code(Path.cwd(), target)
    os.set_inheritable(lock, True)  # the stage inherits the lock
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # DVC calls `python`
    os.chdir(target)
    os.execv(sys.executable, [sys.executable, "-m", f"stages.{stage}", *words])


def copy_code(code: Path, target: Path) -> None:
    """Copies the code into a folder, replacing the code there, and configures DVC to work there without git."""
    for name in CODE:
        if (code / name).is_dir():
            shutil.rmtree(target / name, ignore_errors=True)
            shutil.copytree(code / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(code / name, target / name)
    settings = target / ".dvc" / "config"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text("[core]\n    analytics = false\n    check_update = false\n    no_scm = true\n")


if __name__ == "__main__":
    run_stage(run)
