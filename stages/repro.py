"""`make repro`: checks the experiment, runs what is stale under one Ray cluster, prints the comparison."""

from __future__ import annotations

import subprocess
import sys

from pipeline.config import load
from stages import main


def run() -> None:
    """Ends with the status of `dvc repro`. Nothing heavy starts when nothing is to do."""
    load()
    if subprocess.run([sys.executable, "-m", "dvc", "status", "--quiet"]).returncode:
        _reproduce()
    _show()


def _reproduce() -> None:
    from pipeline import cluster
    from stages import check

    check.run()
    with cluster.local(), subprocess.Popen([sys.executable, "-m", "dvc", "repro"]) as dvc:
        try:
            status = dvc.wait()
        except KeyboardInterrupt:  # the terminal sent it to DVC as well, which ends the stage under way
            dvc.wait()
            raise
    if status:
        sys.exit(status)


def _show() -> None:
    from pipeline import report

    report.show()


if __name__ == "__main__":
    main(run)
