"""Training through Ray: interrupted, taken up, repeated, diverged."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline import config, shard
from stages import prepare

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the digits' shards and an experiment of one small run, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["models"] = {"vit": params["models"]["vit"]}
    params["sweeps"]["recipe"] |= {"runs": [], "own_space": {}}
    params["sweeps"]["hybrid"] |= {"runs": []}
    params["recipes"]["digits"] |= {"epochs": 6, "warmup_epochs": 1, "global_batch_size": 256}
    params["train"] |= {"cpus_per_worker": 1}
    write(params)
    data = config.load().data
    prepare.write_digits(Path(data.source))
    shard.write(data.source, data.shards, images_per_shard=512, seed=0)
    return tmp_path


def write(params: dict) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(params))


def change(section: str, **values) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    (params["recipes"]["digits"] if section == "recipe" else params[section]).update(values)
    write(params)


def training() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "stages.train", "vit"], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish() -> str:
    process = training()
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def note() -> dict:
    return json.loads(Path("outputs/vit/run.json").read_text())


def fingerprints() -> list[str]:
    return sorted(path.name for path in Path("outputs/vit/checkpoints").iterdir() if path.is_dir())


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_weights_of_an_uninterrupted_one(place):
    process = training()
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 3/6" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not Path("outputs/vit/run.json").exists()
    [interrupted] = Path("outputs/vit/checkpoints").glob("*/run.json")
    begun = json.loads(interrupted.read_text())

    output = finish()
    assert "epoch 1/6" not in output and "epoch 6/6" in output
    resumed, found = load_file("outputs/vit/weights.safetensors"), note()
    assert found["mlflow_run_id"] == begun["mlflow_run_id"]
    assert found["status"] == "finished" and fingerprints() == [found["fingerprint"]]
    with open("outputs/vit/history.csv", newline="") as history:
        assert [row["epoch"] for row in csv.DictReader(history)] == list("012345")
    last = next(Path("outputs/vit/checkpoints").glob("*/epoch-0006/state.pt"))
    state = torch.load(last, weights_only=True)["model"]

    output = finish()  # a finished training that is run again starts over, in an MLflow run of its own
    assert "epoch 1/6" in output
    assert note()["mlflow_run_id"] != found["mlflow_run_id"]
    assert note()["fingerprint"] == found["fingerprint"]
    for name, weight in torch.load(last, weights_only=True)["model"].items():
        assert torch.equal(weight, state[name]), name
    for name, weight in load_file("outputs/vit/weights.safetensors").items():
        assert torch.equal(weight, resumed[name]), name


@pytest.mark.slow
def test_two_compiled_ray_workers_train_as_one_eager_worker_does(place):
    losses = []
    for settings in ({"workers": 1}, {"workers": 2, "compile": True, "loader_workers": 1}):
        change("train", **settings)
        change("recipe", epochs=3)
        finish()
        with open("outputs/vit/history.csv", newline="") as history:
            losses.append([float(row["train/loss"]) for row in csv.DictReader(history)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # sums in another order, in float32


@pytest.mark.slow
def test_a_diverged_training_says_so_and_leaves_all_that_its_stage_declares(place):
    change("recipe", lr=1e30, epochs=2, clip_grad_norm=None, warmup_epochs=0)
    output = finish()
    assert "diverged" in output and "train/" in output
    assert note()["status"] == "diverged"
    assert all(weight.isfinite().all() for weight in load_file("outputs/vit/weights.safetensors").values())
    assert yaml.safe_load(Path("outputs/vit/config.yaml").read_text())["recipe"]["lr"] == 1e30
    assert Path("outputs/vit/history.csv").read_text().startswith("epoch,lr,train/loss,val/loss")


def test_the_fingerprint_follows_what_the_weights_are_a_function_of(place):
    from pipeline import train

    def fingerprint() -> str:
        experiment = config.load()
        return train.fingerprint(experiment.resolved("vit"), experiment.data.shards)

    first = fingerprint()
    change("train", keep_checkpoints=5, loader_workers=1)
    assert fingerprint() == first
    change("train", amp="bf16")
    assert (second := fingerprint()) != first
    change("recipe", lr=1.0)
    assert (third := fingerprint()) not in (first, second)
    with open("data/shards/digits/manifest.json", "a") as manifest:
        manifest.write(" ")
    assert fingerprint() not in (first, second, third)


def test_a_batch_that_does_not_divide_over_the_workers_is_refused_before_ray_starts(place):
    from pipeline import train

    change("train", workers=3)
    with pytest.raises(config.ConfigError, match="256 does not divide over train.workers 3"):
        train.train(config.load(), "vit")
