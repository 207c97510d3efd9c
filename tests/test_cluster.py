"""Clusters: independent runs side by side, jobs whose results last, two nodes; the files in deploy/."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline import cluster, config, track
from pipeline.config import ConfigError
from stages import job, preset, seeds, train_all

ROOT = Path(__file__).resolve().parent.parent

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
    monkeypatch.setattr(cluster, "room", lambda settings: 2)
    monkeypatch.setattr(track, "make_experiment", lambda name: None)
    return tmp_path


def overlaps(names: list[str]) -> int:
    """How many of these stand-ins were at work at once, at most."""
    spans = [tuple(map(float, Path(f"{name}.ended").read_text().split())) for name in names]
    return max(sum(began <= at < ended for began, ended in spans) for at, _ in spans)


def test_runs_train_side_by_side_as_far_as_there_is_room(stand_in):
    names = ["a", "b", "c", "d"]
    assert train_all.train(names, config.load(ROOT / "params.yaml")) == dict.fromkeys(names, 0)
    assert overlaps(names) == 2


def test_one_run_starts_where_the_cluster_seems_to_have_no_room(stand_in, monkeypatch):
    monkeypatch.setattr(cluster, "room", lambda settings: 0)
    names = ["a", "b"]
    assert train_all.train(names, config.load(ROOT / "params.yaml")) == dict.fromkeys(names, 0)
    assert overlaps(names) == 1


def test_a_run_that_fails_leaves_the_others_be(stand_in):
    assert train_all.train(["broken", "a", "b"], config.load(ROOT / "params.yaml")) == {"broken": 3, "a": 0, "b": 0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_that_run_and_starts_nothing_more(stand_in, number):
    program = f"""
import sys
from pipeline import cluster, config, track
from stages import train_all

cluster.connect, cluster.room, track.make_experiment = lambda cpus: None, lambda settings: 2, lambda name: None
train_all.train(["long-a", "long-b", "c"], config.load({str(ROOT / "params.yaml")!r}))
"""
    Path("program.py").write_text(program)
    # From elsewhere, so that its own `stages` is the true one and that of the trainings the stand-in.
    process = subprocess.Popen([sys.executable, "-P", "program.py"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for(lambda: Path("long-a.began").exists() and Path("long-b.began").exists(), 60)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert Path("long-a.stopped").exists() and Path("long-b.stopped").exists()
    assert not Path("c.began").exists()


def wait_for(happened, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("nodes", "train", "room"),
    [
        ([{"CPU": 2}], {}, 2),
        ([{"CPU": 2}], {"workers": 3}, 0),
        ([{"CPU": 3}, {"CPU": 3}], {"cpus_per_worker": 2}, 2),  # a worker does not lie across nodes
        ([{"CPU": 96, "GPU": 8}] * 4, {"workers": 16, "cpus_per_worker": 8}, 2),
        ([{"CPU": 96, "GPU": 8}] * 4, {"workers": [8, 32], "cpus_per_worker": 8}, 1),  # one that takes all there is
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}], {"cpus_per_worker": 4}, 1),  # a head without GPUs does not count
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}], {"cpus_per_worker": 4, "gpu": False}, 18),
    ],
)
def test_room_is_counted_in_whole_workers(nodes, train, room, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())["train"]
    assert cluster.room(config.Train.model_validate({**settings, **train})) == room


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for path in ("params.yaml", "presets/imagenet.yaml"):
        Path(path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, path)
    return tmp_path


def test_seeds_are_runs_more_and_asked_for_again_the_same(experiment):
    before = Path("params.yaml").read_text()
    names = seeds.run(["e-vit", "vit"], [0, 1, 2])
    assert names == ["e-vit", "e-vit-seed1", "e-vit-seed2", "vit", "vit-seed1", "vit-seed2"]
    loaded = config.load()
    for name in names:
        base = loaded.run(name.partition("-seed")[0])
        assert loaded.run(name).model_copy(update={"seed": None}) == base
    assert [loaded.seed_of(name) for name in names] == [0, 1, 2, 0, 1, 2]
    after = Path("params.yaml").read_text()
    assert seeds.run(["e-vit", "vit"], [0, 1, 2]) == names and Path("params.yaml").read_text() == after
    assert seeds.without(after) == before  # comments and all


def test_seeds_of_no_run_or_under_a_taken_name_are_refused(experiment):
    with pytest.raises(ConfigError, match="RUNS=e-vit SEEDS="):
        seeds.run([], [1])
    with pytest.raises(ConfigError, match="no run named 'evit'"):
        seeds.run(["evit"], [1])
    seeds.run(["vit"], [1])
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("seed: 1}", "seed: 4}"))
    with pytest.raises(ConfigError, match="vit-seed1 is not vit with seed 1"):
        seeds.run(["vit"], [1])


def test_a_preset_named_again_keeps_its_seeds(experiment):
    shutil.copy("presets/imagenet.yaml", "params.yaml")
    seeds.run(["e-vit-s"], [1])
    with_seed = Path("params.yaml").read_text()
    preset.run("imagenet")
    assert Path("params.yaml").read_text() == with_seed
    preset.run("imagenet", "/elsewhere")  # nothing of one's own is lost by another source
    assert config.load().data.source == "/elsewhere"


def test_a_jobs_folder_takes_the_code_and_keeps_the_rest(tmp_path, root):
    place = tmp_path / "study"
    place.mkdir()
    job.lay_out(root, place)
    (place / "outputs").mkdir()
    (place / "outputs" / "kept").touch()
    (place / "flopeq" / "of_an_older_version.py").touch()
    job.lay_out(root, place)
    assert (place / "outputs" / "kept").exists()
    assert not (place / "flopeq" / "of_an_older_version.py").exists()  # training's fingerprint would count it
    assert (place / "stages" / "repro.py").read_bytes() == (root / "stages" / "repro.py").read_bytes()
    stages = subprocess.check_output([sys.executable, "-m", "dvc", "stage", "list", "--name-only"], cwd=place, text=True)
    assert "train@e-vit" in stages.split()


def test_a_folder_has_one_job_at_a_time(tmp_path, root):
    held = job._alone_in(tmp_path)
    done = subprocess.run([sys.executable, "-m", "stages.job", str(tmp_path), "check"], cwd=root, text=True,
                          capture_output=True)
    os.close(held)
    assert done.returncode == 2 and "another job is at work" in done.stderr


def test_an_unknown_stage_is_named_before_a_job_touches_its_folder(tmp_path):
    with pytest.raises(ConfigError, match="no stage named 'reproduce'; known: .*repro"):
        job.run(str(tmp_path / "study"), "reproduce")
    assert not (tmp_path / "study").exists()
