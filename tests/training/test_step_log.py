"""Numbers of single steps: what they are, that they cost nothing, and that MLflow gets each once, whatever fails."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from pipeline import track
from pipeline.base import config
from pipeline.training import step_log
from pipeline.training.device_time import DataWait
from pipeline.training.epoch_tracker import EpochTracker
from pipeline.training.step_log import StepLog
from tests.conftest import ROOT
from tests.training.test_loop import BATCH, PER_EPOCH, assert_same_weights, fit, network, small_recipe, start

CPU = torch.device("cpu")

STEPS = PER_EPOCH // BATCH


@pytest.mark.parametrize("clip_grad_norm", [None, 1e-3])
def test_steps_are_logged_and_the_weights_stay_the_same(clip_grad_norm):
    recipe, steps = small_recipe(clip_grad_norm=clip_grad_norm, epochs=3), StepLog(CPU, interval_s=0)
    logged, plain = (fit(start(recipe, network()), recipe, step_log=each) for each in (steps, None))
    assert_same_weights(logged.model, plain.model)
    rows = steps.take()
    assert [row["step"] for row in rows] == list(range(3 * STEPS)) and steps.take() == []
    for epoch, row in enumerate(logged.history):
        losses = [row["train/step_loss"] for row in rows[epoch * STEPS : (epoch + 1) * STEPS]]
        assert sum(losses) / STEPS == pytest.approx(row["train/loss"], rel=1e-6)
    assert all(row["train/grad_norm"] > 1e-3 for row in rows)  # before it is clipped
    assert all(0 <= row["perf/step_data_wait_pct"] <= 100 for row in rows)
    assert {"train/loss_scale", "perf/gpu_mem_gib"}.isdisjoint(rows[0])


def test_the_norm_is_that_of_the_whole_gradient():
    recipe, steps, model = small_recipe(clip_grad_norm=None, epochs=1), StepLog(CPU, interval_s=0), network(dropout=0)
    norms, training = [], start(recipe, model)
    optimizer_step = training.optimizer.step

    def step(*args: Any, **settings: Any) -> Any:
        norms.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm().item())
        return optimizer_step(*args, **settings)

    training.optimizer.step = step
    fit(training, recipe.model_copy(update={"epochs": 1}), step_log=steps)
    assert [row["train/grad_norm"] for row in steps.take()] == pytest.approx(norms, rel=1e-5)


def test_rows_are_at_least_so_many_seconds_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(step_log.time, "perf_counter", lambda: now[0])
    steps, added = StepLog(CPU), []
    for step in range(100):
        now[0] += 0.75
        if steps.is_due():
            steps.add(step, loss=1.0, grad_norm=2.0, wait_s=now[0] / 4, loss_scale=1024.0)
            added.append(now[0])
    assert len(added) == 7 and min(b - a for a, b in zip(added, added[1:], strict=False)) >= step_log.INTERVAL_S
    rows = steps.take()
    assert [row["perf/step_data_wait_pct"] for row in rows] == pytest.approx([25.0] * 7)
    assert rows[0]["train/loss_scale"] == 1024


def test_the_wait_for_data_is_that_of_the_slowest_worker(monkeypatch):
    wait = DataWait(CPU)
    wait._seconds = 3.0
    others = torch.tensor([1.0, 0.0, 7.0], dtype=torch.float64)
    assert wait.largest_s(lambda by_rank: by_rank + others, 1, 3) == 7.0
    assert wait.largest_s(lambda by_rank: by_rank + others / 7, 1, 3) == 3.0


class Event:
    """Stands for a CUDA event: `now` on the device's clock, done when the device is there."""

    device_s = host_s = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.device_s = max(Event.device_s, Event.host_s)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


@pytest.mark.parametrize(("loading_s", "computing_s", "idle_s"), [(1.0, 0.5, 0.5), (1.0, 5.0, 0.0), (1.0, 0.0, 1.0)])
def test_a_wait_that_the_device_spends_computing_does_not_count(loading_s, computing_s, idle_s, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("pipeline.training.device_time.time.perf_counter", lambda: Event.host_s)
    Event.device_s = Event.host_s = 0.0

    def batches():
        for _ in range(4):
            Event.host_s += loading_s
            yield None

    wait = DataWait(torch.device("cuda"))
    for number, _ in enumerate(wait.measure(batches())):
        assert number == 0 or wait.seconds == pytest.approx(1.0 + number * idle_s)  # the first one waits in full
        Event.device_s = max(Event.device_s, Event.host_s) + computing_s  # queued, and the host goes on


def test_a_server_that_fails_for_a_while_loses_nothing_and_delays_nobody(caplog):
    got, attempts, blocked, go_on = [], [], threading.Event(), threading.Event()

    def log(epochs: list[dict[str, Any]], steps: list[dict[str, Any]]) -> None:
        attempts.append(len(epochs))
        if len(attempts) == 1:
            blocked.set()
            go_on.wait(10)
            raise OSError("no route to host")
        got.extend([*epochs, *steps])

    with EpochTracker("vit", log) as tracker:
        tracker.add({"epoch": 0, "steps": [{"step": 0}]})
        assert blocked.wait(10)
        for epoch in (1, 2):
            tracker.add({"epoch": epoch, "steps": [{"step": epoch}]})  # returns although the server does not answer
        tracker.add({"steps": [{"step": 3}]})
        go_on.set()
    assert got == [{"epoch": 0}, {"epoch": 1}, {"epoch": 2}, {"step": 0}, {"step": 1}, {"step": 2}, {"step": 3}]
    assert "MLflow misses numbers of vit until later: no route to host" in caplog.text


def test_mlflow_gets_each_step_once(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = config.load_experiment(ROOT / "params.yaml")
    run_id = track.start_run(experiment, "vit")
    rows = [{"step": step, "train/step_loss": 1.0 + step, "train/grad_norm": 0.5} for step in (3, 40, 77)]
    track.log_steps(run_id, rows[:2])
    track.log_steps(run_id, rows)  # after a restart from a checkpoint
    client = MlflowClient(track.tracking_uri())
    for name, values in (("train/step_loss", [4, 41, 78]), ("train/grad_norm", [0.5] * 3)):
        history = client.get_metric_history(run_id, name)
        assert [(point.step, point.value) for point in history] == list(zip((3, 40, 77), values, strict=True))
