"""Training through Ray: run again, changed, diverged; and the same on any number of workers."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from mlflow import MlflowClient
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from pipeline import track
from pipeline.base import config, errors
from pipeline.base.yaml_files import dump_yaml, read_yaml
from pipeline.loading import batching, datasets
from pipeline.packing import pack
from pipeline.packing.sources import digits
from pipeline.shards import manifests
from pipeline.training import loop, recipe, trainer
from pipeline.training.fingerprint import compute_fingerprint as training_fingerprint
from stages import train as train_stage
from tests.conftest import params_with_runs, ray_cluster

# Ray warns of its own use of itself.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")

STEPS = 6  # of the optimizer


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_cluster(num_cpus=2) as cluster:
        yield cluster


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the digits' shards and an experiment of one small run, as the working directory."""
    monkeypatch.chdir(tmp_path)
    params = params_with_runs("vit")
    params["models"]["vit"]["args"]["depth"] = 2
    params["recipes"]["digits"] |= {"epochs": 6, "warmup_epochs": 1, "global_batch_size": 256}
    params["train"] |= {"cpus_per_worker": 1}
    write(params)
    described = config.load_experiment().data
    digits.write_digits(Path(described.source))
    pack.pack_source(described.source, described.shards, images_per_shard=512, seed=0)
    return tmp_path


def write(params: dict) -> None:
    Path("params.yaml").write_text(dump_yaml(params))


def change(section: str, **values) -> None:
    params = read_yaml(Path("params.yaml"))
    (params["recipes"]["digits"] if section == "recipe" else params[section]).update(values)
    write(params)


@pytest.fixture
def train(cluster: Cluster, place: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """Runs the stage `train` for the run of the experiment, and returns what it logged."""
    caplog.set_level(logging.INFO, "pipeline")

    def train(*options: str) -> str:
        caplog.clear()
        train_stage.run("vit", *options)
        return caplog.text

    return train


def note() -> dict:
    return json.loads(Path("outputs/vit/run.json").read_text())


def fingerprints() -> list[str]:
    return sorted(path.name for path in Path("outputs/vit/checkpoints").iterdir() if path.is_dir())


@pytest.mark.slow
def test_a_finished_run_rewrites_outputs_and_a_new_config_starts_beside_it_or_adopts_it(train):
    change("recipe", epochs=2, warmup_epochs=1)
    assert "epoch 2/2" in train()
    written = {path.name: path.read_bytes() for path in Path("outputs/vit").iterdir() if path.is_file()}
    assert written.keys() == {
        "weights.safetensors", "weights_ema.safetensors", "history.csv", "run.json", "config.yaml"
    }  # fmt: skip
    assert load_file("outputs/vit/weights_ema.safetensors") == {}
    for name in written:
        Path("outputs/vit", name).unlink()
    output = train()
    assert "vit is trained already" in output and "epoch" not in output
    assert {path.name: path.read_bytes() for path in Path("outputs/vit").iterdir() if path.is_file()} == written
    first = note()
    assert fingerprints() == [first["fingerprint"]]

    change("recipe", lr=1e-4)
    output = train()
    assert "vit starts anew, and keeps step-00000010 of another configuration" in output
    assert "recipe.lr 0.002 -> 0.0001. " in output and "starts at step 0" in output
    second = note()
    assert second["fingerprint"] != first["fingerprint"] and second["mlflow_run_id"] != first["mlflow_run_id"]
    assert fingerprints() == sorted([first["fingerprint"], second["fingerprint"]])

    change("recipe", epochs=3)
    output = train("--adopt", second["fingerprint"])
    assert "recipe.epochs 2 -> 3" in output and "resumes from step 10 of 15" in output
    differences = ["recipe.epochs 2 -> 3"]
    assert note()["adopted"] == {"fingerprint": second["fingerprint"], "step": 10, "differences": differences}
    tags = MlflowClient(track.tracking_uri()).get_run(note()["mlflow_run_id"]).data.tags
    assert tags["adopted"] == second["fingerprint"] and tags["status"] == "finished"
    assert len(Path("outputs/vit/history.csv").read_text().splitlines()) == 4


@pytest.mark.slow
def test_two_compiled_ray_workers_train_as_one_eager_worker_does(train):
    losses = []
    for settings in ({"workers": 1}, {"workers": 2, "compile": True, "loader_workers": 1}):
        change("train", **settings)
        change("recipe", epochs=2)
        train()
        with open("outputs/vit/history.csv", newline="") as history:
            losses.append([float(row["train/loss"]) for row in csv.DictReader(history)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # sums in another order, in float32


@pytest.mark.slow
def test_a_diverged_training_says_so_and_leaves_all_that_its_stage_declares(train):
    change("recipe", lr=1e30, epochs=2, clip_grad_norm=None, warmup_epochs=0)
    output = train()
    assert "diverged" in output and "train/" in output
    assert note()["status"] == "diverged" and "images of this worker's batch: ['train/" in note()["message"]
    assert all(weight.isfinite().all() for weight in load_file("outputs/vit/weights.safetensors").values())
    assert read_yaml(Path("outputs/vit/config.yaml"))["recipe"]["lr"] == 1e30
    assert Path("outputs/vit/history.csv").read_text().startswith("epoch,lr,train/loss,val/loss")


def test_the_fingerprint_follows_what_the_weights_are_a_function_of(place):
    def current() -> str:
        experiment = config.load_experiment()
        return training_fingerprint(experiment.resolved("vit"), manifests.Shards(experiment.data.shards))

    first = current()
    change("train", keep_checkpoints=5, loader_workers=1, workers=[1, 4], batch_per_worker=16, checkpoint_steps=7)
    assert current() == first
    change("train", amp="bf16")
    assert (second := current()) != first
    change("recipe", lr=1.0)
    assert (third := current()) not in (first, second)
    shards = Path("data/shards/digits")
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["classes"].reverse()
    (shards / "manifest.json").write_text(json.dumps(manifest))
    assert current() not in (first, second, third)


def test_more_workers_than_a_batch_has_groups_are_refused_before_ray_starts(place):
    change("train", workers=17)
    with pytest.raises(errors.ConfigError, match="workers 17: a global batch of 256 .* at most 16"):
        trainer.train_run(config.load_experiment(), "vit")


# The same mathematics on any number of workers


def _one_of(rank: int, world_size: int, path: str) -> None:
    """A few steps in float64 with 64 / 4 images at a time, on so many workers."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{path}/rendezvous-{world_size}", rank=rank, world_size=world_size
    )
    experiment = config.load_experiment(f"{path}/params.yaml")
    described = experiment.recipe("vit")
    shards = manifests.Shards(Path(path) / experiment.data.shards)
    images = {split: datasets.IndexedImages(shards, split) for split in ("train", "val")}
    model = recipe.build_model(experiment.run("vit"), described, num_classes=shards.num_classes, seed=0).double()
    rank_args = {"rank": rank, "world_size": world_size}
    parts = []

    def in_float64(batches):
        for batch in batches:
            parts.append(len(batch.images))
            yield batch._replace(images=batch.images.double())

    def all_reduce(sums: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(sums)
        return sums

    def on_step_end(training: loop.TrainState) -> None:
        if training.step == STEPS:
            raise KeyboardInterrupt

    ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    training = loop.TrainState.create(model, described, steps_per_epoch=22, amp=None)
    with suppress(KeyboardInterrupt):
        loop.fit(
            training,
            described,
            seed=0,
            num_classes=shards.num_classes,
            forward=ddp,
            no_sync=ddp.no_sync,
            all_reduce=all_reduce,
            on_epoch=lambda training: None,
            on_step=on_step_end,
            val_batches=lambda: [],
            train_batches=lambda epoch, start_step: in_float64(
                batching.train_batches(
                    images["train"],
                    described,
                    experiment.data,
                    seed=0,
                    epoch=epoch,
                    start_step=start_step,
                    batch_size=16,
                    **rank_args,
                )
            ),
            **rank_args,
        )
    assert parts == [16] * (STEPS * 4 // world_size)
    if rank == 0:
        torch.save([model.state_dict(), training.ema.module.state_dict()], f"{path}/{world_size}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_four_parts_of_a_batch_make_the_same_weights_on_one_two_and_four_workers(place):
    change(
        "recipe",
        global_batch_size=64,
        drop_path=0.0,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        random_erasing=0.5,
        repeated_augmentation=2,
        ema_decay=0.9,
    )
    for world_size in (1, 2, 4):
        torch.multiprocessing.spawn(_one_of, (world_size, str(place)), nprocs=world_size)
    expected, *others = (torch.load(place / f"{world_size}.pt", weights_only=True) for world_size in (1, 2, 4))
    experiment = config.load_experiment()
    initial = recipe.build_model(experiment.run("vit"), experiment.recipe("vit"), num_classes=10, seed=0).state_dict()
    for found in others:
        for state, wanted in zip(found, expected, strict=True):
            for name, weight in wanted.items():
                assert weight.dtype == torch.float64
                torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-10)
    assert not any(torch.equal(initial[name].double(), weight) for name, weight in expected[0].items())
