"""Trains runs in parallel, as many at once as the cluster holds: `python -m stages.train_all <run> ...`."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pipeline import cluster
from pipeline.base import config
from stages import load_experiment, run_stage

_POLL_S = 0.2


def run(*run_names: str) -> None:
    """Exits with the status of a failed run, if any."""
    experiment = load_experiment()
    for name in run_names:
        experiment.check_is_trained(name)
    settings = experiment.train
    with cluster.local_cluster(settings.least_workers * settings.cpus_per_worker):
        statuses = train_runs(run_names, experiment)
    if failed := [status for status in statuses.values() if status]:
        sys.exit(failed[0])


def train_runs(run_names: Sequence[str], experiment: config.Experiment) -> dict[str, int]:
    """Trains each run in its own process, `stages.train`. Returns their exit statuses when all have ended.

    A run starts only if the cluster, counted again each time, holds all its workers beside those of running runs, so
    that no run holds workers while it waits for more. One run always starts. A failed run does not stop the others.
    SIGINT and SIGTERM are forwarded to all, and this process exits with 128 + the signal once they have ended.
    """
    from pipeline import track
    from pipeline.training import failures

    track.create_experiment(experiment.tracking.experiment)
    settings = experiment.train
    cluster.connect(settings.least_workers * settings.cpus_per_worker)
    waiting, statuses = list(run_names), {}
    running: dict[str, subprocess.Popen[bytes]] = {}
    signals = []
    with _record_signals(signal.SIGINT, signal.SIGTERM, into=signals):
        num_forwarded = 0
        while running or waiting:
            for number in signals[num_forwarded:]:
                num_forwarded += 1
                waiting.clear()
                for process in running.values():
                    process.send_signal(number)
            for name, process in list(running.items()):
                if (status := process.poll()) is not None:
                    statuses[name] = status
                    del running[name]
            if waiting and (not running or len(running) < cluster.max_concurrent_runs(settings)):
                name = waiting.pop(0)
                # In its own session, it gets the terminal's Ctrl-C only once, forwarded by this process.
                running[name] = subprocess.Popen([sys.executable, "-m", "stages.train", name], start_new_session=True)
            else:
                time.sleep(_POLL_S)
    if signals:
        sys.exit(128 + signals[0])
    for name, status in statuses.items():
        if status:
            logging.error("%s failed with status %d; the reason is above", name, status)
            failures.note_exit(name, status)
    return statuses


@contextmanager
def _record_signals(*numbers: signal.Signals, into: list[int]) -> Iterator[None]:
    """Appends signals to a list instead of handling them."""
    before = {number: signal.signal(number, lambda number, _: into.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_stage(run)
