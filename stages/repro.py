"""`make repro`: checks the experiment, runs what is stale under one Ray cluster, prints the comparison."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from pipeline import cluster, config
from stages import check, main, preset, report, seeds, train_all

if TYPE_CHECKING:
    import psutil

_DVC = (sys.executable, "-m", "dvc")
_POLL_S = 0.1
_AWAKE_S = 1.0  # after which a stage heeds SIGTERM


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
        _call_dvc("repro", "shard", *_recipes(experiment, run_names))  # with the sweeps that find some of them
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


def _recipes(experiment: config.Experiment, run_names: Sequence[str]) -> list[str]:
    """The stages that write the runs' recipes."""
    names = dict.fromkeys(experiment.run(name).recipe for name in run_names)
    return [f"{'tuned' if name in experiment.sweeps.tuned else 'recipe'}@{name}" for name in names]


def _call_dvc(*words: str) -> None:
    """Exits with DVC's status where it fails; with 143 after a SIGTERM, once the stage under way has ended."""
    caught, told = [], set()
    before = signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    # DVC would die of a SIGTERM and leave its stage behind; told by the shell to ignore it, DVC waits for the stage.
    with subprocess.Popen(["sh", "-c", 'trap "" TERM; exec "$@"', "sh", *_DVC, *words]) as dvc:
        try:
            while (status := dvc.poll()) is None:
                if caught:
                    _end_stage(dvc.pid, told)
                time.sleep(_POLL_S)
        except KeyboardInterrupt:  # the terminal sent it to DVC as well, which ends the stage under way
            dvc.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if status:
        sys.exit(128 + caught[0] if caught else status)


def _end_stage(dvc: int, told: set[int]) -> None:
    """SIGTERM to the stage under way, once; SIGINT to DVC where there is none: while there is one, DVC ignores it."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        stages = list(_stages(psutil.Process(dvc)))
        for process in stages:
            if process.pid not in told and time.time() - process.create_time() > _AWAKE_S:
                told.add(process.pid)
                process.terminate()
        if not stages and dvc not in told:
            told.add(dvc)
            psutil.Process(dvc).send_signal(signal.SIGINT)


def _stages(parent: psutil.Process) -> Iterator[psutil.Process]:
    """What DVC runs, in a shell or not."""
    for process in parent.children():
        if process.cmdline()[1:2] == ["-m"]:
            yield process
        else:
            yield from _stages(process)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages.repro", description=__doc__)
    parser.add_argument("preset", nargs="?", help="a preset's name; nothing: params.yaml as it is")
    parser.add_argument("source", nargs="?", help="what its data.source shall be")
    parser.add_argument("--runs", nargs="+", default=[], help="train and evaluate these only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="each of --runs with each of these seeds")
    return parser


if __name__ == "__main__":
    main(run)
