"""The first hour on a cluster as one command: `python -m stages.smoke [folder]`.

Trains a small network with one worker on every GPU, runs a sweep trial, evaluates, and measures throughput, in a folder
of its own (`smoke`), which must be on a disk that all nodes share. Prints a verdict for each and exits with 1 if one
fails. Without GPUs, everything runs on the CPU.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline import cluster
from pipeline.base.yaml_files import dump_yaml, read_yaml
from stages import job, run_stage

_CHANCE_PCT = 10.0  # of ten digits

_GPU_TASK_S = 5.0  # long enough for all GPUs to have a task at the same time


class CheckFailedError(RuntimeError):
    """Raised by a check that finds something wrong. The message says what."""


def run(folder: str = "smoke") -> None:
    """Exits with 1 if a check fails. Raises: ClusterError if the cluster does not answer."""
    target = Path(folder).absolute() / f"{datetime.now():%Y-%m-%d-%H%M%S}"  # nothing is taken over from a former one
    target.mkdir(parents=True, exist_ok=True)
    job.copy_code(Path.cwd(), target)
    with cluster.local_cluster():
        cluster.connect()
        num_gpus = cluster.num_gpus()
        (target / "params.yaml").write_text(dump_yaml(smoke_params(num_gpus)))
        failed = [name for name, check in checks(target, num_gpus) if not _verdict(name, check)]
    logging.info("%s; logs in %s", f"FAILED: {', '.join(failed)}" if failed else "all is well", target / "logs")
    if failed:
        sys.exit(1)


def smoke_params(num_gpus: int) -> dict[str, Any]:
    """Returns an experiment of two small ViTs on the digits, with every augmentation, one worker for each GPU."""
    params = read_yaml(Path("presets/imagenette.yaml"))
    workers = max(1, num_gpus)
    params["data"] |= {"name": "digits", "source": "data/source/digits", "image_size": 32}
    params["models"] = {name: params["models"][name] for name in ("vit", "e-vit")}
    for model in params["models"].values():
        model["args"] = {**model["args"], "img_size": 32}
    params["recipes"]["photos"] |= {
        "epochs": 30 if num_gpus else 3,
        "warmup_epochs": 1,
        "global_batch_size": max(64, 16 * workers),
        "drop_path": 0.1,
        "random_erasing": 0.25,
        "mixup_alpha": 0.2,
        "flop_prob": 0.0,
        "random_crop_scale": [0.8, 1.0],
        "ema_decay": 0.99,
        "test_crop_ratio": 1.0,
    }
    on_gpu = {"amp": "bf16", "compile": True, "loader_workers": 2} if num_gpus else {"loader_workers": 1}
    params["train"] |= {"workers": workers, "checkpoint_steps": 10, **on_gpu}
    params["throughput"] |= {"runs": 5, "compile": bool(num_gpus), "paper_sizes": False}
    search = {"runs": ["vit"], "searcher": "random", "trials": 1, "round": 1, "epochs": 2, "asha": None}
    params["sweeps"]["recipe"] |= {**search, "confirm_seeds": 0, "rank_configs": 2}
    params["tracking"] |= {"experiment": "smoke"}
    return params


def checks(target: Path, num_gpus: int) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yields the name of every check and a function that does it and returns what it found."""

    def stage(name: str, *words: str) -> None:
        log = target / "logs" / f"{name}.txt"
        log.parent.mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(target)}
        with log.open("w") as file:
            command = [sys.executable, "-m", f"stages.{name}", *words]
            status = subprocess.run(command, cwd=target, env=environment, stdout=file, stderr=file).returncode
        if status:
            last = (log.read_text().strip().splitlines() or ["it says nothing"])[-1]
            raise CheckFailedError(f"it exits with {status}: {last}")

    def data() -> str:
        stage("prepare")
        stage("shard")
        return "digits are sharded"

    def train() -> str:
        stage("train", "vit")
        info = json.loads((target / "outputs/vit/run.json").read_text())
        with (target / "outputs/vit/history.csv").open(newline="") as file:
            last = list(csv.DictReader(file))[-1]
        require(info["status"] == "finished", f"it is {info['status']}")
        require(info["compiled"] or not num_gpus, "the machine cannot compile")
        require(float(last["val/top1_pct"]) > 2 * _CHANCE_PCT, f"top-1 is {last['val/top1_pct']}%")
        return (
            f"{max(1, num_gpus)} workers, {float(last['perf/img_per_s']):.0f} images/s, waited for data "
            f"{float(last['perf/data_wait_pct']):.0f}% of the time, top-1 {float(last['val/top1_pct']):.1f}%"
        )

    def sweep() -> str:
        stage("sweep_recipe")
        with (target / "sweeps/recipe/trials.csv").open(newline="") as file:
            states = [row["state"] for row in csv.DictReader(file)]
        require(bool(states) and set(states) == {"finished"}, f"trials are {', '.join(states) or 'missing'}")
        return f"{len(states)} trial"

    def evaluate() -> str:
        stage("evaluate", "vit")
        found = json.loads((target / "outputs/vit/metrics.json").read_text())["val/top1_pct"]
        with (target / "outputs/vit/history.csv").open(newline="") as file:
            best = max(float(row["val/top1_pct"]) for row in csv.DictReader(file))
        require(abs(found - best) < 2, f"top-1 is {found:.1f}%, and training found {best:.1f}%")
        return f"top-1 {found:.1f}%, as in training"

    def throughput() -> str:
        stage("throughput")
        rows = json.loads((target / "reports/throughput.json").read_text())
        devices = {row["device"] for row in rows}
        require(not num_gpus or devices != {"cpu"}, "it ran on a CPU")
        return ", ".join(f"{row['run']} {row['img_per_s']:.0f} images/s" for row in rows) + f" on {devices.pop()}"

    if num_gpus:
        yield "every GPU computes", lambda: check_gpus(num_gpus)
    yield from (("data", data), ("training", train), ("sweep trial", sweep))
    yield from (("evaluate", evaluate), ("throughput", throughput))


def check_gpus(num_gpus: int) -> str:
    """Multiplies matrices on every GPU at the same time and compares the results."""
    import ray

    results = ray.get([ray.remote(num_gpus=1, num_cpus=0)(_use_gpu).remote() for _ in range(num_gpus)])
    found = {(node, gpu): name for node, gpu, name, _ in results}
    errors = [f"{node}/{gpu} is off by {error:.1e}" for node, gpu, _, error in results if error > 1e-3]
    require(not errors, "; ".join(errors))
    require(len(found) == num_gpus, f"only {len(found)} of {num_gpus} GPUs had a task")
    return f"{num_gpus} of {', '.join(sorted(set(found.values())))}"


def _use_gpu() -> tuple[str, str, str, float]:
    """Returns node, GPU, its name, and the relative error of a product in float32."""
    import platform

    import torch

    ended, error = time.monotonic() + _GPU_TASK_S, 0.0
    left = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    expected = left @ left
    while time.monotonic() < ended:
        product = (left.cuda() @ left.cuda()).cpu()
        error = max(error, ((product - expected).abs().max() / expected.abs().max()).item())
    return platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.get_device_name(), error


def require(holds: bool, message: str) -> None:
    """Raises CheckFailedError with the message unless the condition holds."""
    if not holds:
        raise CheckFailedError(message)


def _verdict(name: str, check: Callable[[], str]) -> bool:
    """Runs a check and prints its verdict. Returns whether it passed."""
    started = time.monotonic()
    try:
        found, passed = check(), True
    except Exception as error:  # of any kind: the other checks run all the same
        found, passed = f"{type(error).__name__}: {error}", False
    logging.info("%-4s  %s (%.0f s): %s", "ok" if passed else "FAIL", name, time.monotonic() - started, found)
    return passed


if __name__ == "__main__":
    run_stage(run)
