"""Independent runs train side by side, as many as the cluster has room for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cluster, track
from pipeline.base import config
from stages import train_all
from tests.conftest import wait_for

ROOT = Path(__file__).resolve().parents[2]

# Stands in for a training: notes when it began and ended, takes a second, and ends orderly when told to.
TRAINING = """
import signal, sys, time
from pathlib import Path

def stop(number, frame):
    Path(f"{sys.argv[1]}.stopped").touch()
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
began = time.time()
Path(f"{sys.argv[1]}.began").touch()
time.sleep(30 if sys.argv[1].startswith("long") else 0.5)
Path(f"{sys.argv[1]}.ended").write_text(f"{began} {time.time()}")
sys.exit(3 if sys.argv[1] == "broken" else 0)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which `python -m stages.train` is TRAINING, under a cluster with room for two."""
    monkeypatch.chdir(tmp_path)
    Path("stages").mkdir()
    Path("stages/__init__.py").touch()
    Path("stages/train.py").write_text(TRAINING)
    monkeypatch.setattr(cluster, "connect", lambda cpus: None)
    monkeypatch.setattr(cluster, "max_concurrent_runs", lambda settings: 2)
    monkeypatch.setattr(track, "create_experiment", lambda name: None)
    return tmp_path


def overlaps(names: list[str]) -> int:
    """How many of these stand-ins were at work at once, at most."""
    spans = [tuple(map(float, Path(f"{name}.ended").read_text().split())) for name in names]
    return max(sum(began <= at < ended for began, ended in spans) for at, _ in spans)


def test_runs_train_in_parallel_up_to_the_capacity(stand_in):
    names = ["a", "b", "c", "d"]
    assert train_all.train_runs(names, config.load_experiment(ROOT / "params.yaml")) == dict.fromkeys(names, 0)
    assert overlaps(names) == 2


def test_one_run_starts_even_when_the_cluster_is_full(stand_in, monkeypatch):
    monkeypatch.setattr(cluster, "max_concurrent_runs", lambda settings: 0)
    names = ["a", "b"]
    assert train_all.train_runs(names, config.load_experiment(ROOT / "params.yaml")) == dict.fromkeys(names, 0)
    assert overlaps(names) == 1


def test_a_failed_run_does_not_stop_the_others(stand_in):
    assert train_all.train_runs(["broken", "a", "b"], config.load_experiment(ROOT / "params.yaml")) == {
        "broken": 3,
        "a": 0,
        "b": 0,
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_that_run_and_starts_nothing_more(stand_in, number):
    program = f"""
import sys
from pipeline import cluster, track
from pipeline.base import config
from stages import train_all

cluster.connect, cluster.max_concurrent_runs = lambda cpus: None, lambda settings: 2
track.create_experiment = lambda name: None
train_all.train_runs(["long-a", "long-b", "c"], config.load_experiment({str(ROOT / "params.yaml")!r}))
"""
    Path("program.py").write_text(program)
    # From elsewhere, so that its own `stages` is the true one and that of the trainings the stand-in.
    process = subprocess.Popen([sys.executable, "-P", "program.py"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for(lambda: Path("long-a.began").exists() and Path("long-b.began").exists(), 60)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert Path("long-a.stopped").exists() and Path("long-b.stopped").exists()
    assert not Path("c.began").exists()
