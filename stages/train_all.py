"""Trains runs side by side, as many at once as the cluster has room for: `python -m stages.train_all <run> ...`."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pipeline import cluster, config
from stages import main

_POLL_S = 0.2


def run(*run_names: str) -> None:
    """Ends with the status of a run that failed, if one did."""
    experiment = config.load()
    for name in run_names:
        experiment.run(name)
    settings = experiment.train
    with cluster.local(settings.least_workers * settings.cpus_per_worker):
        statuses = train(run_names, experiment)
    if failed := [status for status in statuses.values() if status]:
        sys.exit(failed[0])


def train(run_names: Sequence[str], experiment: config.Experiment) -> dict[str, int]:
    """Each run in a process of its own, `stages.train`. Returns their exit statuses when all have ended.

    A run starts only while the cluster, counted anew, has room for all its workers beside those of the runs under
    way, so that none holds workers while it waits for more; one always starts. A run that fails leaves the others be.
    SIGINT and SIGTERM are passed on to all, and this process ends with 128 + the signal once they have ended.
    """
    from pipeline import track

    track.make_experiment(experiment.tracking.experiment)
    settings = experiment.train
    cluster.connect(settings.least_workers * settings.cpus_per_worker)
    waiting, statuses = list(run_names), {}
    running: dict[str, subprocess.Popen[bytes]] = {}
    caught = []
    with _catching(signal.SIGINT, signal.SIGTERM, into=caught):
        told = 0
        while running or waiting:
            for number in caught[told:]:
                told += 1
                waiting.clear()
                for process in running.values():
                    process.send_signal(number)
            for name, process in list(running.items()):
                if (status := process.poll()) is not None:
                    statuses[name] = status
                    del running[name]
            if waiting and (not running or len(running) < cluster.room(settings)):
                name = waiting.pop(0)
                # In a session of its own a terminal's Ctrl-C comes to it once, passed on, and not twice.
                running[name] = subprocess.Popen([sys.executable, "-m", "stages.train", name], start_new_session=True)
            else:
                time.sleep(_POLL_S)
    if caught:
        sys.exit(128 + caught[0])
    for name, status in statuses.items():
        if status:
            logging.error("%s ended with status %d, for the reason given above", name, status)
    return statuses


@contextmanager
def _catching(*signals: signal.Signals, into: list[int]) -> Iterator[None]:
    """Signals are noted in a list, and do nothing else."""
    before = {number: signal.signal(number, lambda number, _: into.append(number)) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main(run)
