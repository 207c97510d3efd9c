"""Trainings that are interrupted: what their tests do, and look at."""

from __future__ import annotations

import _thread
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from mlflow import MlflowClient
from ray.util import placement_group_table
from safetensors.torch import load_file
from torch import Tensor

from pipeline import track
from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml, read_yaml
from pipeline.training.checkpoints import CheckpointManager

EPOCHS, PER_EPOCH, EVERY = 2, 22, 3  # 360 images in batches of 16; steps between checkpoints

LIMIT_S = 240  # far beyond what anything takes on two idle cores


def write(params: dict[str, Any]) -> None:
    Path("params.yaml").write_text(dump_yaml(params))


def prepare_trial(
    *, workers: int | list[int] = 1, storage: str = "outputs", float64: bool = False, **wait: int
) -> None:
    """An experiment for so many workers, one of which waits at a step (`rank`, `step`) if any shall."""
    params = read_yaml(Path("params.yaml"))
    params["train"]["workers"], params["storage"] = workers, storage
    if float64:
        params["recipes"]["digits"]["drop_path"] = 0.0
    write(params)
    Path("trial.json").write_text(json.dumps({"float64": float64, **wait}))


def pause_settings(name: str, *, workers: int = 1, least: int = EVERY + 1) -> dict[str, int]:
    """A rank and a step past the first checkpoint, drawn by the name of a test."""
    generator = random.Random(name)
    wait = {"rank": generator.randrange(workers), "step": generator.randrange(least, EPOCHS * PER_EPOCH)}
    print(f"{name}: rank {wait['rank']} waits at step {wait['step']}")
    return wait


@contextmanager
def interrupted(disturb: Callable[[int], None]) -> Iterator[None]:
    """Calls `disturb` once, in a thread, with the id of the process that paused at its step. Its error ends all."""
    failures: list[Exception] = []

    def lurk() -> None:
        try:
            disturb(wait_until_paused())
        except Exception as error:
            failures.append(error)
            _thread.interrupt_main()

    thread = threading.Thread(target=lurk)
    thread.start()
    try:
        yield
        thread.join()
    except KeyboardInterrupt:
        if failures:
            raise failures[0] from None
        raise


def wait_until_paused(driver: subprocess.Popen[str] | None = None) -> int:
    until(lambda: Path("reached").exists() or (driver and driver.poll() is not None))
    assert Path("reached").exists(), driver and wait_for_exit(driver)
    return int(Path("reached").read_text())


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def until(ready: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    give_up = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < give_up, f"not within {limit_s} s; {descendants()}"
        time.sleep(0.05)


def start(*command: str, **settings: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings
    )


def wait_for_exit(process: subprocess.Popen[str]) -> str:
    """Waits for the process to exit and returns its output."""
    return process.communicate(timeout=LIMIT_S)[0]


def steps() -> list[int]:
    """Of the checkpoints that are whole."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in Path().glob("**/steps/*/complete.json"))


class Outputs(NamedTuple):
    weights: dict[str, Tensor]
    history: list[dict[str, str]]


def outputs() -> Outputs:
    """Best weights, last weights and average of a finished training, and its history without its speed."""
    folder = Path("outputs/vit")
    best = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    weights = {f"{kind}.{name}": weight for kind, state in best.items() for name, weight in state.items()}
    note = json.loads((folder / "run.json").read_text())
    assert note["status"] == "finished"
    storage = config.load_experiment().storage
    checkpoints = CheckpointManager(f"{storage}/vit/checkpoints/{note['fingerprint']}/steps", keep=2)
    state = checkpoints.load(f"step-{EPOCHS * PER_EPOCH:08d}")[0]
    weights |= {f"{part}.{name}": weight for part in ("model", "ema") for name, weight in state[part].items()}
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Outputs(weights, [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows])


def assert_identical(found: Outputs, expected: Outputs) -> None:
    assert found.history == expected.history
    assert len(found.weights) > 40 and found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), name


def assert_one_whole_mlflow_run() -> None:
    client = MlflowClient(track.tracking_uri())
    [experiment] = [experiment for experiment in client.search_experiments() if experiment.name == "digits"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    for metric in (*track.EPOCH_METRICS, *track.EMA_METRICS):
        told = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
        assert told == list(range(EPOCHS)), metric


def assert_nothing_left(keep: int = 2) -> None:
    """No process or placement group on the cluster, no half-written file or note of Ray's."""
    until(lambda: not re.findall(r"ray::(?:RayTrainW|TrainC)\w*", " ".join(descendants())), 15)
    until(lambda: all(group["state"] == "REMOVED" for group in placement_group_table().values()), 15)
    names = " ".join(path.name for path in Path("outputs/vit").rglob("*"))
    assert not re.search(r"\bray-|\bstop\b|journal|partial", names), names
    folders = [path for path in Path("outputs/vit").glob("**/steps/*")]
    assert len(steps()) == len(folders) <= keep


def descendants() -> list[str]:
    """Command lines of the processes that this one has started, and those of these."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found


def resumed(told: str) -> list[int]:
    """The steps from which a training went on, as the terminal says."""
    return [int(step) for step in re.findall(r"vit resumes from step (\d+) of 44", told)]
