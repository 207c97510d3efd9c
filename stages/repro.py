"""`make repro`: checks the experiment, runs what is stale under one Ray cluster, prints the comparison."""

from __future__ import annotations

import subprocess
import sys

from pipeline import cluster, config
from stages import check, main, preset, report


def run(*wanted: str) -> None:
    """Ends with the status of `dvc repro`. Nothing heavy starts when nothing is to do.

    Args:
        wanted: a preset's name, and what its data.source shall be; nothing: params.yaml as it is.
    """
    if wanted:
        preset.run(*wanted)
    train = config.load().train
    if subprocess.run([sys.executable, "-m", "dvc", "status", "--quiet"]).returncode:
        check.run()
        _reproduce(cpus=train.least_workers * train.cpus_per_worker)
    report.show()


def _reproduce(cpus: int) -> None:
    with cluster.local(cpus), subprocess.Popen([sys.executable, "-m", "dvc", "repro"]) as dvc:
        try:
            status = dvc.wait()
        except KeyboardInterrupt:  # the terminal sent it to DVC as well, which ends the stage under way
            dvc.wait()
            raise
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main(run)
