"""Runs a stage in a folder that outlives the job: `python -m stages.job <folder> <stage> [words ...]`.

The working directory of a Ray job is a copy of the code, which Ray throws away. The folder, on a disk that all nodes
have under the same path, takes that code and keeps what stages leave beside it: data, outputs, reports, dvc.lock,
mlflow.db. The next job with that folder goes on from there.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from pipeline.config import ConfigError
from stages import main

CODE = ("flopeq", "pipeline", "presets", "stages", "dvc.yaml", "params.yaml")
"""What a stage is a function of; Ray uploads no more than git and .rayignore let it."""


def run(folder: str, stage: str, *words: str) -> None:
    """Ends with the stage's status. Raises: ConfigError for an unknown stage, or while another job is in the folder."""
    if importlib.util.find_spec(f"stages.{stage}") is None:
        known = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
        raise ConfigError(f"no stage named {stage!r}; known: {', '.join(known)}")
    place = Path(folder).absolute()
    place.mkdir(parents=True, exist_ok=True)
    lock = _alone_in(place)
    if place != Path.cwd():
        lay_out(Path.cwd(), place)
    os.set_inheritable(lock, True)  # the stage keeps it
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # DVC calls `python`
    os.chdir(place)
    os.execv(sys.executable, [sys.executable, "-m", f"stages.{stage}", *words])


def lay_out(code: Path, place: Path) -> None:
    """Puts the code into a folder, in place of the code there. DVC is told that git does not know that folder."""
    for name in CODE:
        if (code / name).is_dir():
            shutil.rmtree(place / name, ignore_errors=True)
            shutil.copytree(code / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(code / name, place / name)
    settings = place / ".dvc" / "config"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text("[core]\n    analytics = false\n    check_update = false\n    no_scm = true\n")


def _alone_in(place: Path) -> int:
    lock = os.open(place / ".job", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"another job is at work in {place}: wait for it, or name another folder") from None
    return lock


if __name__ == "__main__":
    main(run)
