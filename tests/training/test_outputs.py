"""A training that has ended is never lost: its outputs come from its run directory, whatever MLflow does."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn

from pipeline import track
from pipeline.base import config
from pipeline.base.errors import BusyError, ConfigError
from pipeline.base.yaml_files import dump_yaml, read_yaml
from pipeline.shards import manifests
from pipeline.training import adoption, failures, outputs
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.fingerprint import hash_inputs, training_inputs
from pipeline.training.run_directory import RunDirectory
from stages import prune
from stages import train as train_stage
from tests.conftest import params_with_runs

EPOCH = dict.fromkeys(outputs.HISTORY_COLUMNS, 1.0) | {"epoch": 0}


def change_recipe(**values: object) -> None:
    params = read_yaml(Path("params.yaml"))
    params["recipes"]["digits"] |= values
    Path("params.yaml").write_text(dump_yaml(params))


def network() -> nn.Module:
    return nn.Linear(2, 3)


def current() -> tuple[RunDirectory, dict]:
    """The run directory of the experiment as it is now, and what its fingerprint is computed from."""
    experiment = config.load_experiment()
    inputs = training_inputs(experiment.resolved("vit"), manifests.Shards(experiment.data.shards))
    return RunDirectory.for_run(experiment, "vit", hash_inputs(inputs)), inputs


def end_training(*names: str, step: int = 10) -> RunDirectory:
    """Leaves what a training of the run with these weights leaves when it has ended."""
    run_dir, inputs = current()
    run_dir.resume_or_create(inputs)
    checkpoints = CheckpointManager(run_dir.checkpoints_location, keep=2)
    checkpoints.save(step, {"model": network().state_dict()}, {name: network().state_dict() for name in names})
    checkpoints.wait()
    run_dir.save_status("id", "finished")
    run_dir.save(
        "outcome",
        {
            "status": "finished",
            "message": None,
            "history": [EPOCH],
            "best_epoch": dict.fromkeys(names, 0),
            "compiled": False,
            "weights": checkpoints.weights_entries(checkpoints.list_names()[-1]),
            "configuration": config.load_experiment().resolved("vit"),
        },
    )
    return run_dir


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment of one run, with a manifest of shards, as the working directory."""
    monkeypatch.chdir(tmp_path)
    params = params_with_runs("vit")
    Path("params.yaml").write_text(dump_yaml(params))
    shards = Path(config.load_experiment().data.shards)
    shards.mkdir(parents=True)
    manifest = {"location": None, "shards": {}, "indices": {}, "counts": {}, "classes": [*"0123456789"]}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What MLflow is told, instead of telling it."""
    logged = []
    monkeypatch.setattr(outputs, "_UPLOAD_WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(track, "log_epochs", lambda run_id, history: logged.append("epochs"))
    monkeypatch.setattr(
        track, "log_results", lambda run_id, metrics, files: logged.extend(sorted(file.name for file in files))
    )
    monkeypatch.setattr(track, "end_run", lambda run_id, status: logged.append(status))
    return logged


@pytest.mark.parametrize("names", [("plain",), ("plain", "ema")])
def test_an_ended_training_is_written_out_without_ray_or_training(names, place, logged, monkeypatch):
    monkeypatch.setattr("pipeline.cluster.connect", None)  # a call would raise
    run_dir = end_training(*names)
    train_stage.run("vit")
    folder = Path("outputs/vit")
    assert len(load_file(folder / "weights.safetensors")) == 2
    assert len(load_file(folder / "weights_ema.safetensors")) == (2 if "ema" in names else 0)
    run = json.loads((folder / "run.json").read_text())
    assert (run["fingerprint"], run["best_epoch"], run["compiled"]) == (run_dir.fingerprint, 0, False)
    assert read_yaml(folder / "config.yaml")["recipe"]["lr"] == config.load_experiment().recipe("vit").lr
    assert (folder / "history.csv").read_text().splitlines()[1].startswith("0,1.0")
    weights = [outputs.WEIGHTS_FILES[name] for name in sorted(names, reverse=True)]
    assert logged == ["epochs", *sorted(["config.yaml", *weights]), "finished"]
    train_stage.run("vit")
    assert logged.count("epochs") == 1


def test_a_training_of_other_parameters_is_not_taken_for_that_of_now(place, logged):
    end_training("plain")
    change_recipe(lr=1e-3)
    assert not outputs.write_finished_outputs(config.load_experiment(), "vit")
    change_recipe(lr=2e-3)
    assert outputs.write_finished_outputs(config.load_experiment(), "vit")


def test_damaged_weights_are_not_written_out(place, logged, caplog):
    run_dir = end_training("plain")
    weights = next(Path(run_dir.checkpoints_location).rglob("plain.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert not outputs.write_finished_outputs(config.load_experiment(), "vit")
    assert not Path("outputs/vit/run.json").exists() and "damaged" in caplog.text


def test_a_tracking_server_that_fails_does_not_lose_a_training(place, logged, monkeypatch, caplog):
    calls = []

    def fail(*_: object) -> None:
        calls.append(Path("outputs/vit/run.json").exists())
        raise ConnectionError("the server is down")

    end_training("plain")
    with monkeypatch.context() as patch:
        patch.setattr(track, "log_results", fail)
        train_stage.run("vit")
    assert calls == [True, True]  # noted before, and repeated
    assert "vit is trained, but MLflow does not have its outcome" in caplog.text and "the server is down" in caplog.text
    assert "finished" not in logged
    train_stage.run("vit")
    assert logged[-1] == "finished"


@pytest.mark.parametrize(
    ("error", "noted"), [(RuntimeError("out of\nmemory"), "memory"), (BusyError("busy"), None), (SystemExit(143), None)]
)
def test_a_failed_training_leaves_a_note_and_an_interrupted_one_does_not(error, noted, place):
    failures.note_exit("vit", -9)
    path = Path("outputs/vit", failures.FAILURE_FILE)
    assert json.loads(path.read_text())["message"] == "its process ended with status -9"
    with pytest.raises(type(error)), failures.note_failure("vit"):
        raise error
    assert (json.loads(path.read_text())["message"] if path.exists() else None) == noted


# Checkpoints of other configurations


def test_what_another_configuration_left_stays_and_what_differs_is_said(place, caplog):
    former = end_training("plain")
    change_recipe(lr=1e-3, epochs=60)
    run_dir, inputs = current()
    inputs["torch"], inputs["pipeline/training/worker.py"] = "99.0", "other"
    adoption.log_other_configurations(run_dir, inputs, "vit")
    run_dir.resume_or_create(inputs)
    assert former.list_checkpoints() == ["step-00000010"]
    assert f"keeps step-00000010 of another configuration in {former.storage}: " in caplog.text
    for phrase in ("recipe.lr 0.002 -> 0.001", "recipe.epochs 50 -> 60", "-> 99.0", "worker.py changed"):
        assert phrase in caplog.text
    assert f"python -m stages.train vit --adopt {former.fingerprint}" in caplog.text


def test_a_first_training_says_nothing_of_others(place, caplog):
    run_dir, inputs = current()
    adoption.log_other_configurations(run_dir, inputs, "vit")
    assert not caplog.records


def test_an_adopted_checkpoint_is_copied_and_recorded(place):
    former = end_training("plain")
    change_recipe(lr=1e-3)
    run_dir, inputs = current()
    adoption.adopt_checkpoint(run_dir, former.fingerprint, inputs, network(), ("plain",))
    assert CheckpointManager(run_dir.checkpoints_location, keep=1).latest() == "step-00000010"
    assert run_dir.load("adopted") == {
        "fingerprint": former.fingerprint,
        "step": 10,
        "differences": ["recipe.lr 0.002 -> 0.001"],
    }
    assert former.list_checkpoints() == ["step-00000010"]


def truncate(run_dir: RunDirectory) -> None:
    (Path(run_dir.checkpoints_location) / "step-00000010/state.pt").write_bytes(b"")


@pytest.mark.parametrize(
    ("prepare", "changes", "model", "names", "message"),
    [
        (lambda _: None, {"global_batch_size": 128}, (2, 3), ["plain"], "global_batch_size 64 -> 128"),
        (lambda _: None, {"optimizer": "lamb"}, (2, 3), ["plain"], "optimizer adamw -> lamb"),
        (lambda _: None, {"lr": 1e-3}, (2, 4), ["plain"], r"weight is \(3, 2\) there and \(4, 2\) here"),
        (lambda _: None, {"lr": 1e-3}, (2, 3), ["plain", "ema"], "keeps plain weights, and this recipe plain, ema"),
        (truncate, {"lr": 1e-3}, (2, 3), ["plain"], "has no complete checkpoint"),
        (RunDirectory.delete, {"lr": 1e-3}, (2, 3), ["plain"], "vit has no such configuration; known: none"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_not_adopted(
    prepare: Callable[[RunDirectory], None], changes, model, names, message, place
):
    former = end_training("plain")
    prepare(former)
    change_recipe(**changes)
    run_dir, inputs = current()
    with pytest.raises(ConfigError, match=message):
        adoption.adopt_checkpoint(run_dir, former.fingerprint, inputs, nn.Linear(*model), names)
    assert not run_dir.list_checkpoints()


def test_a_training_with_a_checkpoint_of_its_own_adopts_none(place):
    former = end_training("plain")
    change_recipe(lr=1e-3)
    run_dir = end_training("plain")
    with pytest.raises(ConfigError, match="has step-00000010 of its own"):
        adoption.adopt_checkpoint(run_dir, former.fingerprint, current()[1], network(), ("plain",))


def test_pruning_deletes_what_neither_the_parameters_nor_the_outputs_use_and_only_when_told(place, logged, caplog):
    caplog.set_level(logging.INFO)
    directories = []
    for lr in (1e-3, 2e-3, 3e-3):  # the second one's weights are in outputs/, the third is that of now
        change_recipe(lr=lr)
        directories.append(end_training("plain"))
        if lr == 2e-3:
            train_stage.run("vit")
    trials = Path("sweeps/trials/recipe")
    for name in ("kept", "former"):
        (trials / name).mkdir(parents=True)
    prune.run()
    assert [bool(each.list_checkpoints()) for each in directories] == [True, True, True]
    assert f"{directories[0].storage}  0.00 GiB  step-00000010  recipe.lr 0.001 -> 0.003" in caplog.text
    prune.run("--delete")
    assert [each.local_dir.exists() for each in directories] == [False, True, True]
    assert (trials / "former").exists()  # the sweep has not ended
    (trials / "used.json").write_text(json.dumps({"fingerprints": ["kept"]}))
    prune.run("--delete")
    assert [path.name for path in trials.iterdir() if path.is_dir()] == ["kept"]


def test_checkpoints_at_a_url_are_listed_adopted_and_deleted(place):
    params = read_yaml(Path("params.yaml"))
    Path("params.yaml").write_text(dump_yaml({**params, "storage": f"file://{place}/elsewhere"}))
    former = end_training("plain")
    assert former.storage.startswith("file://") and Path("elsewhere/vit/checkpoints").is_dir()
    change_recipe(lr=1e-3)
    run_dir, inputs = current()
    adoption.adopt_checkpoint(run_dir, former.fingerprint, inputs, network(), ("plain",))
    assert run_dir.list_checkpoints() == former.list_checkpoints() == ["step-00000010"]
    former.delete()
    assert not former.list_checkpoints() and [d.fingerprint for d in run_dir.list_configurations()] == [
        run_dir.fingerprint
    ]
