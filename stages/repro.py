"""`make repro`: checks the experiment, runs what is stale under one Ray cluster, prints the comparison."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence

from pipeline import cluster, config
from stages import check, main, preset, report, seeds, train_all

_DVC = (sys.executable, "-m", "dvc")


def run(*words: str) -> None:
    """Ends with the status of what failed, if anything did. Nothing heavy starts when nothing is to do."""
    wanted = _parser().parse_args(words)
    if wanted.preset:
        preset.run(wanted.preset, wanted.source)
    runs = seeds.run(wanted.runs, wanted.seeds) if wanted.seeds else wanted.runs
    experiment = config.load()
    for name in runs:
        experiment.run(name)
    targets = [f"evaluate@{name}" for name in runs]
    if subprocess.run([*_DVC, "status", "--quiet", "--with-deps", *targets]).returncode:
        check.run()
        _reproduce(experiment, runs or list(experiment.models), targets)
    report.show(runs)


def _reproduce(experiment: config.Experiment, run_names: Sequence[str], targets: Sequence[str]) -> None:
    """`dvc repro`, but that trainings, none of which needs another, run side by side."""
    settings = experiment.train
    with cluster.local(settings.least_workers * settings.cpus_per_worker):
        _call_dvc("repro", "shard")
        stages = [f"train@{name}" for name in run_names]
        changed = json.loads(subprocess.check_output([*_DVC, "status", "--json", *stages]))
        if stale := [name for name in run_names if f"train@{name}" in changed]:
            statuses = train_all.train(stale, experiment)
            # DVC takes over what they left as if it had started them.
            if done := [f"train@{name}" for name in stale if not statuses[name]]:
                _call_dvc("commit", "--quiet", "--force", *done)
            if failed := [status for status in statuses.values() if status]:
                sys.exit(failed[0])
        _call_dvc("repro", *targets)


def _call_dvc(*words: str) -> None:
    """Exits with DVC's status where it fails."""
    with subprocess.Popen([*_DVC, *words]) as dvc:
        try:
            status = dvc.wait()
        except KeyboardInterrupt:  # the terminal sent it to DVC as well, which ends the stage under way
            dvc.wait()
            raise
    if status:
        sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages.repro", description=__doc__)
    parser.add_argument("preset", nargs="?", help="a preset's name; nothing: params.yaml as it is")
    parser.add_argument("source", nargs="?", help="what its data.source shall be")
    parser.add_argument("--runs", nargs="+", default=[], help="train and evaluate these only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="each of --runs with each of these seeds")
    return parser


if __name__ == "__main__":
    main(run)
