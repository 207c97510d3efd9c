"""Sweeps give the same trials whatever happens on the way: killed, stopped, diverged, run again."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml, read_yaml
from stages import prepare, shard
from tests.conftest import ray_tmpdir

ROOT = Path(__file__).resolve().parents[2]


def trial_files(place: Path) -> dict[str, list[str]]:
    """Each trial's journal, without timings."""
    found = {}
    for path in sorted((place / "sweeps/trials/recipe").glob("*/epochs.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [(row["epoch"], row["val/top1_pct"]) for row in rows if "epoch" in row]
    return found


def table(place: Path) -> list[dict[str, str]]:
    """trials.csv without timings."""
    with (place / "sweeps/recipe/trials.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits' shards and a sweep of two small runs."""
    place = tmp_path_factory.mktemp("sweep")
    params = read_yaml(ROOT / "params.yaml")
    for run in params["models"].values():
        run["args"]["embed_dim"] = 32
    params["recipes"]["digits"] |= {"global_batch_size": 256, "mixup_group": 64, "epochs": 4, "warmup_epochs": 1}
    params["sweeps"]["recipe"] |= {
        "runs": ["vit"],
        # In this order of its fields, the sampler draws a better recipe than the run's own, which is then confirmed.
        "space": dict(sorted(params["sweeps"]["recipe"]["space"].items())),
        "own_space": {},
        "trials": 3,
        "round": 1,
        "epochs": 3,
        "confirm_seeds": 3,
        "rank_configs": 2,
        "asha": {"grace_epochs": 1, "reduction_factor": 2},
    }
    params["sweeps"]["hybrid"] |= {"runs": []}
    (place / "params.yaml").write_text(dump_yaml(params))
    before = Path.cwd()
    os.chdir(place)
    try:
        prepare.run()
        shard.run()
    finally:
        os.chdir(before)
    return place


def start_sweep(place: Path, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "stages.sweep_recipe"],
        cwd=place,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run_sweep(place: Path, **variables: str) -> str:
    output, _ = (process := start_sweep(place, **variables)).communicate(timeout=500)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def reference_outcome(digits: Path, running_cluster: dict[str, str]) -> list[dict[str, str]]:
    """The trials of a sweep that nothing interrupted."""
    run_sweep(digits, **running_cluster)
    return table(digits)


def copy_of(digits: Path, place: Path, recipe: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Another folder with the same data and nothing swept; `changes` are of the sweep, `recipe` of what it varies."""
    place.mkdir(exist_ok=True)
    params = read_yaml(digits / "params.yaml")
    params["recipes"]["digits"] |= recipe or {}
    params["sweeps"]["recipe"] |= changes
    (place / "params.yaml").write_text(dump_yaml(params))
    (place / "data").symlink_to(digits / "data")
    return place


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of two cores that outlives its drivers; the variables that lead there."""
    code = (
        "import sys; from ray.cluster_utils import Cluster;"
        "args = {'num_cpus': 2, 'dashboard_port': None};"  # another cluster on this machine may have the usual port
        "nodes = Cluster(initialize_head=True, head_node_args=args); print('at', nodes.address, flush=True);"
        "sys.stdin.read(); nodes.shutdown()"
    )
    head = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": ray_tmpdir()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert head.stdout is not None and head.stdin is not None
    address = next(line.split()[1] for line in head.stdout if line.startswith("at "))
    yield {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address, "HEAD": str(head.pid)}
    head.stdin.close()
    head.wait(timeout=60)
    head.stdout.close()


def assert_nothing_is_left(variables: dict[str, str]) -> None:
    """No placement group, no trial, every core free."""
    code = """
import sys, time, ray
ray.init(log_to_driver=False)
for _ in range(60):
    groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
    if not groups and ray.available_resources().get("CPU") == 2:
        sys.exit()
    time.sleep(0.5)
sys.exit(f"left: {groups} {ray.available_resources()}")
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Of all actors, Ray Train's coordinator is one for all jobs of a cluster, and stays.
    for title in ("ImplicitFunc", "TrainController", "RayTrainWorker"):
        assert not processes(variables["HEAD"], f"ray::{title}"), title


def processes(head: str, word: str) -> list[int]:
    """Processes below that one whose title has the word."""
    parents, titles = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[path.name] = (path / "stat").read_text().rpartition(")")[2].split()[1]
            titles[path.name] = (path / "cmdline").read_text(errors="replace")

    def is_below(pid: str) -> bool:
        return pid in parents and (parents[pid] == head or is_below(parents[pid]))

    return [int(pid) for pid, title in titles.items() if word in title and is_below(pid)]


def wait_for_epochs(place: Path, process: subprocess.Popen, count: int) -> None:
    """Until so many epochs were trained in all."""
    until = time.monotonic() + 300
    while sum(map(len, trial_files(place).values())) < count:
        assert process.poll() is None and time.monotonic() < until, process.stdout and process.stdout.read()
        time.sleep(0.05)


def kill_one(place: Path, process: subprocess.Popen, cluster: dict[str, str], title: str, *, after: int) -> None:
    """Kills one process with that title after so many epochs."""
    wait_for_epochs(place, process, after)
    [victim, *_] = processes(cluster["HEAD"], title)
    os.kill(victim, signal.SIGKILL)


@pytest.mark.slow
def test_a_finished_sweep_is_not_trained_again_and_its_outcome_is_a_row(
    digits: Path, reference_outcome: list, running_cluster: dict[str, str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (digits / "sweeps/trials").rglob("epochs.jsonl")}
    output = run_sweep(digits, **running_cluster)
    assert {path: path.stat().st_mtime_ns for path in (digits / "sweeps/trials").rglob("epochs.jsonl")} == before
    assert table(digits) == reference_outcome and "new seed" in output
    assert [row["round"] for row in reference_outcome if row["confirms"] == "0"] == list("012")
    confirmation = [row for row in reference_outcome if row["confirms"] == "1"]
    assert len(confirmation) >= 2 and {row["epochs"] for row in confirmation} == {"4"}
    experiment = config.load_experiment(digits / "params.yaml")
    best = max(
        (row for row in reference_outcome if row["state"] == "finished" and row["confirms"] == "0"),
        key=lambda row: float(row["top1_pct"]),
    )
    is_confirmed = json.loads((digits / "sweeps/recipe/findings.json").read_text())["vit"]["is_confirmed"]
    assert experiment.recipe("vit-tuned").lr == (float(best["lr"]) if is_confirmed else experiment.recipe("vit").lr)


@pytest.mark.slow
def test_a_killed_sweep_resumes_to_the_same_table(
    digits: Path, reference_outcome: list, running_cluster: dict[str, str], tmp_path: Path
) -> None:
    place = copy_of(digits, tmp_path / "place")
    resume_after(place, start_sweep(place, **running_cluster), running_cluster, signal.SIGKILL)
    assert table(place) == reference_outcome


@pytest.mark.slow
def test_a_sweep_goes_on_when_a_trials_process_dies_and_resumes_after_ctrl_c(
    digits: Path, reference_outcome: list, running_cluster: dict[str, str], tmp_path: Path
) -> None:
    place = copy_of(digits, tmp_path / "place", confirm_seeds=0)
    process = start_sweep(place, **running_cluster)
    kill_one(place, process, running_cluster, "ray::ImplicitFunc", after=2)
    resume_after(place, process, running_cluster, signal.SIGINT)
    assert table(place) == [row for row in reference_outcome if row["confirms"] == "0"]


def resume_after(place: Path, process: subprocess.Popen, cluster: dict[str, str], end: signal.Signals) -> None:
    """Ends a sweep after four epochs and runs it again. No epoch is trained twice but those of the running trials."""
    wait_for_epochs(place, process, 4)
    process.send_signal(end)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert_nothing_is_left(cluster)
    interrupted = trial_files(place)
    run_sweep(place, **cluster)
    ended = trial_files(place)
    for name, epochs in interrupted.items():
        assert ended[name][: len(epochs) - 1] == epochs[:-1]
    repeated = sum(len(epochs) - len(dict(epochs)) for epochs in ended.values())
    assert repeated <= 3  # of each ended process the epoch whose checkpoint was being written
    assert_nothing_is_left(cluster)


@pytest.mark.slow
def test_a_trial_of_two_workers_is_a_ray_train_run_and_survives_a_workers_death(
    digits: Path, running_cluster: dict[str, str], tmp_path: Path
) -> None:
    place = copy_of(digits, tmp_path / "place", workers=2, trials=1, asha=None, confirm_seeds=0)
    process = start_sweep(place, **running_cluster)
    kill_one(place, process, running_cluster, "ray::RayTrainWorker", after=2)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert [(row["state"], row["epochs"]) for row in table(place)] == [("finished", "3")]
    assert_nothing_is_left(running_cluster)


@pytest.mark.slow
def test_a_trial_larger_than_the_cluster_is_refused_at_once(
    digits: Path, running_cluster: dict[str, str], tmp_path: Path
) -> None:
    place = copy_of(digits, tmp_path / "place", workers=1, cpus_per_worker=3)
    output, _ = (process := start_sweep(place, **running_cluster)).communicate(timeout=60)
    assert process.returncode == 2
    assert "a trial needs 1 x 3 CPUs, and the Ray cluster has 2 CPUs on 1 node" in output


@pytest.mark.slow
def test_a_diverged_and_a_failed_trial_are_recorded_and_the_sweep_goes_on(
    digits: Path, running_cluster: dict[str, str], tmp_path: Path
) -> None:
    place = copy_of(
        digits,
        tmp_path / "place",
        {"clip_grad_norm": None, "warmup_epochs": 0},
        searcher="grid",
        trials=None,
        epochs=2,
        asha=None,
        confirm_seeds=0,
        # The last is a network for other images than there are, which only a forward pass can tell.
        space={"lr": {"choice": [1e30, 1e-3]}, "args.img_size": {"choice": [32, 24]}},
    )
    output = run_sweep(place, **running_cluster)
    rows = {(row["lr"], row["args.img_size"]): row for row in table(place)}
    assert rows["0.001", "32"]["state"] == "finished"
    assert rows["1e+30", "32"]["state"] == "diverged" and "loss" in rows["1e+30", "32"]["message"]
    assert rows["0.001", "24"]["state"] == "failed" and "height (32)" in rows["0.001", "24"]["message"]
    assert "diverged" in output and "failed" in output
