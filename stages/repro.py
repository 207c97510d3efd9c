"""`make repro`: checks the experiment, runs stale stages on one Ray cluster, prints the comparison.

DVC runs every stage, one after another. Stale trainings are started ahead of it, side by side. DVC's `train@<run>` then
takes over the training whose fingerprint is that of now, within seconds, or trains itself. So dvc.lock never says that
weights were made with parameters that were written while they were trained.
"""

from __future__ import annotations

import argparse
import configparser
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import cluster
from pipeline.base import config, locks
from pipeline.base.errors import ConfigError
from stages import check, preset, report, run_stage, seeds, train_all

if TYPE_CHECKING:
    import psutil


_DVC = (sys.executable, "-m", "dvc")

LOCK = Path(".repro.lock")

_BESIDE_RUNS = ("sweep_recipe", "sweep_hybrid", "scaling", "paper_sizes")
"""Stages that do not depend on the trained runs."""

_SUMMARIES = ("complexity", "throughput", "report")
"""Stages that depend on all runs, in their order."""

_POLL_S = 0.1

_SIGTERM_GRACE_S = 1.0  # after this time, a stage handles SIGTERM


def run(*words: str) -> None:
    """Exits with the status of a failed stage, if any. Starts nothing heavy if everything is up to date.

    Raises: BusyError if another `make repro` runs in this folder.
    """
    args = _parser().parse_args(words)
    with locks.hold_lock(LOCK, f"{Path.cwd()}"):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    if args.preset:
        preset.run(args.preset, args.source)
    runs = seeds.add_seeds(args.runs, args.seeds) if args.seeds else args.runs
    experiment = config.load_experiment()
    for name in runs:
        experiment.run(name)
    targets = [_evaluation_stage(experiment, name) for name in runs]
    status = 0
    if subprocess.run([*_DVC, "status", "--quiet", "--with-deps", *targets]).returncode:
        check.run()
        check_git()
        status = _run_pipeline(experiment, runs or experiment.run_names, targets)
    if runs:  # alone, because its dependency `outputs` would have DVC train all other runs
        _run_dvc("repro", "--single-item", "complexity")
    report.print_report(runs)
    if status:
        sys.exit(status)


def check_git() -> None:
    """Raises ConfigError if this folder is no git repository, and DVC is not configured to work without one."""
    settings = configparser.ConfigParser()
    settings.read([".dvc/config", ".dvc/config.local"])
    if not Path(".git").exists() and not settings.getboolean("core", "no_scm", fallback=False):
        raise ConfigError(
            f"{Path.cwd()} is no git repository, for example because it was downloaded as a zip, and DVC expects one: "
            "run `git init && git add . && git commit -m start` here, or, to work without git, "
            "`.venv/bin/dvc config --local core.no_scm true`"
        )


def _run_pipeline(experiment: config.Experiment, run_names: Sequence[str], targets: Sequence[str]) -> int:
    """Runs `dvc repro` on the targets (none: all stages), but trains the runs in parallel before it.

    If a run fails, the others are evaluated and reported all the same. Returns the status of the first failure, or 0.
    """
    settings = experiment.train
    trained = list(dict.fromkeys(experiment.trained_name(name) for name in run_names))
    with cluster.local_cluster(settings.least_workers * settings.cpus_per_worker):
        _run_dvc("repro", "shard", *_recipe_stages(experiment, trained))  # includes the sweeps that find some of them
        stages = [f"train@{name}" for name in trained]
        changed = json.loads(subprocess.check_output([*_DVC, "status", "--json", *stages]))
        stale = [name for name in trained if f"train@{name}" in changed]
        statuses = train_all.train_runs(stale, experiment) if stale else {}
        failed = [name for name, status in statuses.items() if status]
        if failed:
            usable = [name for name in run_names if experiment.trained_name(name) not in failed]
            others = [_evaluation_stage(experiment, name) for name in usable]
            remaining = [*others, *(() if targets else _BESIDE_RUNS)]
        else:
            remaining = targets
        failures = [statuses[name] for name in failed]
        names = [name for name in run_names if experiment.trained_name(name) not in failed]
        _evaluate_side_by_side(experiment, names)
        if remaining or not failed:
            failures += _try_dvc("repro", "--keep-going", *remaining)
        if failures and not targets:  # alone, because they depend on `outputs`, and so on the runs that failed
            failures += _try_dvc("repro", "--single-item", *_SUMMARIES)
        if failed:
            logging.error("%s failed to train; the other runs are evaluated", ", ".join(failed))
        return failures[0] if failures else 0


def _evaluate_side_by_side(experiment: config.Experiment, run_names: Sequence[str]) -> None:
    """Evaluates runs on all GPUs of the cluster, if it has several. What fails is left to the `dvc repro` after it."""
    at_once = 0 if experiment.train.gpu is False else cluster.num_gpus()
    if at_once < 2 or len(run_names) < 2:
        return
    _try_dvc("repro", "--keep-going", *dict.fromkeys(f"train@{experiment.trained_name(name)}" for name in run_names))
    stages = [_evaluation_stage(experiment, name) for name in run_names]
    changed = json.loads(subprocess.check_output([*_DVC, "status", "--json", *stages]))
    commands = [("--wait-for-lock", "repro", "--single-item", stage) for stage in stages if stage in changed]
    _, signalled = _run_dvc_commands(commands, at_once)
    if signalled:
        sys.exit(128 + signal.SIGTERM)


def _evaluation_stage(experiment: config.Experiment, run_name: str) -> str:
    """Returns the stage that evaluates a run."""
    return f"{'symmetrize' if run_name in experiment.symmetrized else 'evaluate'}@{run_name}"


def _try_dvc(*words: str) -> list[int]:
    """Runs DVC. Returns a list of its exit status if it fails, or an empty list. Exits after a SIGTERM."""
    try:
        _run_dvc(*words)
    except SystemExit as failure:
        if failure.code == 128 + signal.SIGTERM:
            raise
        return [int(failure.code or 0)]
    return []


def _recipe_stages(experiment: config.Experiment, run_names: Sequence[str]) -> list[str]:
    """Returns the stages that write the runs' recipes."""
    names = dict.fromkeys(experiment.run(name).recipe for name in run_names)
    return [f"{'tuned' if name in experiment.sweeps.tuned else 'recipe'}@{name}" for name in names]


def _run_dvc(*words: str) -> None:
    """Runs DVC. Exits with its status if it fails, or with 143 after a SIGTERM, once the running stage has ended."""
    [status], signalled = _run_dvc_commands([words], at_once=1)
    if status:
        sys.exit(128 + signal.SIGTERM if signalled else status)


def _run_dvc_commands(commands: Sequence[Sequence[str]], at_once: int) -> tuple[list[int], bool]:
    """Runs DVC with each list of arguments, so many at once. After a SIGTERM, the running stages end and no more start.

    Returns the exit statuses, and whether there was a SIGTERM.
    """
    signals, signalled, waiting, statuses = [], set(), list(commands), []
    running: list[subprocess.Popen[bytes]] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                # DVC would die of a SIGTERM and leave its stage behind; told by the shell to ignore it, DVC waits for
                # the stage.
                command = ["sh", "-c", 'trap "" TERM; exec "$@"', "sh", *_DVC, *waiting.pop(0)]
                running.append(subprocess.Popen(command))
            time.sleep(_POLL_S)
            statuses += [dvc.returncode for dvc in running if dvc.poll() is not None]
            running = [dvc for dvc in running if dvc.returncode is None]
            if signals:
                waiting.clear()
                for dvc in running:
                    _terminate_stage(dvc.pid, signalled)
    except KeyboardInterrupt:  # the terminal sent it to DVC as well, which ends the running stage
        for dvc in running:
            dvc.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return statuses, bool(signals)


def _terminate_stage(dvc: int, signalled: set[int]) -> None:
    """Sends SIGTERM to the running stage, once; without one, SIGINT to DVC, which ignores it while a stage runs."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        stages = list(_stage_processes(psutil.Process(dvc)))
        for process in stages:
            if process.pid not in signalled and time.time() - process.create_time() > _SIGTERM_GRACE_S:
                signalled.add(process.pid)
                process.terminate()
        if not stages and dvc not in signalled:
            signalled.add(dvc)
            psutil.Process(dvc).send_signal(signal.SIGINT)


def _stage_processes(parent: psutil.Process) -> Iterator[psutil.Process]:
    """Yields the processes that DVC runs, in a shell or directly."""
    for process in parent.children():
        if process.cmdline()[1:2] == ["-m"]:
            yield process
        else:
            yield from _stage_processes(process)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages.repro", description=__doc__)
    parser.add_argument("preset", nargs="?", help="a preset's name; without it, params.yaml does not change")
    parser.add_argument("source", nargs="?", help="the preset's data.source")
    parser.add_argument("--runs", nargs="+", default=[], help="train and evaluate only these runs")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[], help="train each of --runs with each of these seeds"
    )
    return parser


if __name__ == "__main__":
    run_stage(run)
