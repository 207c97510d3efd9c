"""A trained model is one MLflow run with the promised names, through resumptions and losses."""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import track
from pipeline.base import config
from pipeline.base.errors import ConfigError
from pipeline.base.tracking_uri import check_tracking
from stages import ui

EPOCH = {"train/loss": 2.0, "val/top1_pct": 40.0, "val/top5_pct": 80.0, "lr": 1e-3}
EPOCH |= {"perf/img_per_s": 900.0, "perf/data_wait_pct": 3.0}


@pytest.fixture
def experiment(root: Path) -> config.Experiment:
    return config.load_experiment(root / "params.yaml")


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: bytes) -> MlflowClient:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(database)
    return MlflowClient(track.tracking_uri())


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An empty database, made once: its tables take seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


def test_importing_turns_telemetry_off_first(root: Path) -> None:
    code = (
        "import os, sys; assert 'mlflow' not in sys.modules; import pipeline.track;"
        "from mlflow.telemetry.utils import is_telemetry_disabled; assert is_telemetry_disabled();"
        "print(os.environ['MLFLOW_DISABLE_TELEMETRY'], os.environ['DO_NOT_TRACK'])"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["true", "true"]


def test_an_experiment_deleted_in_the_ui_is_refused_with_the_command_that_restores_it(client: MlflowClient) -> None:
    check_tracking("digits")  # not created yet
    experiment_id = client.create_experiment("digits")
    check_tracking("digits")
    client.delete_experiment(experiment_id)
    for refuse in (check_tracking, track.create_experiment):
        with pytest.raises(ConfigError, match=f"'digits' in .* was deleted: .* --experiment-id {experiment_id}`, or"):
            refuse("digits")
    check_tracking("others")
    client.restore_experiment(experiment_id)
    check_tracking("digits")
    track.create_experiment("digits")


def test_uri_is_an_absolute_file_here_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert track.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db" and "////" in track.tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert track.tracking_uri() == "http://127.0.0.1:5000"


def test_run_has_its_name_parameters_and_tags(client: MlflowClient, experiment: config.Experiment) -> None:
    Path("dvc.lock").write_text("lock")
    run = client.get_run(track.start_run(experiment, "e-vit", device="cuda"))
    study = client.get_experiment_by_name("digits")
    assert study is not None and study.experiment_id == run.info.experiment_id
    assert study.artifact_location == (Path.cwd() / "mlartifacts").as_uri()
    assert run.info.run_name == "e-vit"
    params = run.data.params
    assert (params["model"], params["args.embed_dim"]) == ("flop_deit3_small_patch16_224", "64")
    assert (params["recipe.name"], params["recipe.lr"], params["seed"]) == ("digits", "0.002", "0")
    tags = run.data.tags
    assert [tags[key] for key in ("paper_name", "family", "size", "variant")] == ["E(ViT-S)", "vit", "S", "E"]
    assert tags["dvc_lock_sha256"] == hashlib.sha256(b"lock").hexdigest()
    assert (tags["device"], tags["seed"], tags["git_commit"]) == ("cuda", "0", "unknown")
    assert (tags["recipe"], tags["mlflow.source.git.commit"]) == ("digits", "unknown")
    assert (tags["mlflow.user"], tags["mlflow.source.name"]) == (getpass.getuser(), "flopeq")
    assert tags["mlflow.note.content"].startswith("E(ViT-S) on digits, recipe digits, seed 0.")
    assert {f"versions.{name}" for name in ("torch", "timm", "ray", "flopeq")} <= tags.keys()


def test_the_ui_opens_on_the_columns_in_which_runs_compare(client: MlflowClient, experiment: config.Experiment) -> None:
    run_id = track.start_run(experiment, "e-vit")
    study = client.get_experiment(client.get_run(run_id).info.experiment_id)
    view = json.loads(study.tags["mlflow.sharedViewState.comparison"])
    assert view.keys() == {"name", "createdAt", "updatedAt", "state"}  # as MLflow's own UI writes it
    columns = json.loads(view["state"])["selectedColumns"]
    assert {"tags.`family`", "tags.`seed`", "metrics.`best/top1_pct`", "metrics.`complexity/gflops`"} <= set(columns)
    for name in ("best/top1", "difference/to_x"):
        beside = columns.index(f"metrics.`{name}_pct`")
        assert columns[beside + 1 : beside + 3] == [f"metrics.`{name}_low_pct`", f"metrics.`{name}_high_pct`"]
    assert study.tags["mlflow.experimentKind"] == "custom_model_development"

    place = f"#/experiments/{study.experiment_id}/runs"
    shared = f"{place}?workflowType=machine_learning&viewStateShareKey=comparison"
    one = f"{place}/{run_id}?workflowType=machine_learning"
    assert shared in study.tags["mlflow.note.content"]
    local = "http://127.0.0.1:5000/"
    assert track.ui_urls(experiment, [run_id]) == (local + shared, {run_id: local + one})


def test_ui_says_where_the_comparison_is(
    client: MlflowClient, experiment: config.Experiment, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("params.yaml").write_text((root / "params.yaml").read_text())
    track.create_experiment(experiment.tracking.experiment)
    ui.run("5987")
    assert re.fullmatch(
        r"the runs: http://127\.0\.0\.1:5987/#/experiments/\d+/runs\?\S+=comparison\n", capsys.readouterr().out
    )
    Path("mlflow.db").unlink()
    ui.run()
    assert "no runs are tracked yet" in capsys.readouterr().out


def test_edited_experiment_descriptions_are_kept(client: MlflowClient, experiment: config.Experiment) -> None:
    track.create_experiment("digits")
    study = client.get_experiment_by_name("digits")
    assert study is not None
    client.set_experiment_tag(study.experiment_id, "mlflow.note.content", "mine")
    client.delete_experiment_tag(study.experiment_id, "mlflow.experimentKind")
    track.start_run(experiment, "vit")
    tags = client.get_experiment(study.experiment_id).tags
    assert (tags["mlflow.note.content"], tags["mlflow.experimentKind"]) == ("mine", "custom_model_development")


@pytest.mark.parametrize(("updated_at", "renewed"), [(0, True), (1_790_000_000_000, False)])
def test_a_view_of_an_earlier_version_gets_the_new_columns_unless_it_was_edited(
    client: MlflowClient, updated_at: int, renewed: bool
) -> None:
    tag = "mlflow.sharedViewState.comparison"
    experiment_id = client.create_experiment("digits")
    former = {"name": "comparison", "createdAt": 0, "updatedAt": updated_at, "state": "{}"}
    client.set_experiment_tag(experiment_id, tag, json.dumps(former))
    track.create_experiment("digits")
    state = json.loads(client.get_experiment(experiment_id).tags[tag])["state"]
    assert ("best/top1_low_pct" in state) == renewed and (state == "{}") != renewed


def test_without_tracked_runs_there_is_no_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: config.Experiment
) -> None:
    monkeypatch.chdir(tmp_path)
    assert track.ui_urls(experiment, ["0" * 32]) == (None, {})
    assert not list(tmp_path.iterdir())


def test_the_report_gives_a_run_its_card_and_the_best_of_its_numbers(
    client: MlflowClient, experiment: config.Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = track.start_run(experiment, "vit")
    track.log_epochs(run_id, [EPOCH | {"epoch": 0}])
    card = Path("vit.md")
    card.write_text("---\nlicense: apache-2.0\n---\n# vit\n")
    numbers = {"val/top1_pct": 98.0, "val/top1_low_pct": 96.1, "val/top1_high_pct": 99.0, "difference/to_x_pct": -0.5}
    track.publish_report(run_id, card, numbers | {"perf/share": 0.5, "converged": True})
    run = client.get_run(run_id)
    assert run.data.tags["mlflow.note.content"] == "# vit\n"
    metrics = run.data.metrics
    assert (metrics["best/top1_pct"], metrics["val/top1_pct"], metrics["perf/share"]) == (98.0, 40.0, 0.5)
    assert (metrics["best/top1_low_pct"], metrics["best/top1_high_pct"]) == (96.1, 99.0)
    assert metrics["difference/to_x_pct"] == -0.5 and "val/top1_low_pct" not in metrics
    assert [artifact.path for artifact in client.list_artifacts(run_id)] == ["vit.md"]
    track.publish_report("0" * 32, card, {})
    assert "deleted meanwhile?" in caplog.text


def test_models_outside_the_study_have_no_paper_name(client: MlflowClient, experiment: config.Experiment) -> None:
    other = experiment.run("vit").model_copy(update={"model": "resnet18"})
    experiment = experiment.model_copy(update={"models": {"other": other}})
    assert "paper_name" not in client.get_run(track.start_run(experiment, "other")).data.tags


def test_dirty_leaves_out_dvc_lock(client: MlflowClient, experiment: config.Experiment) -> None:
    def git(*command: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], check=True)

    def dirty() -> str:
        return client.get_run(track.start_run(experiment, "vit")).data.tags["git_dirty"]

    git("init", "-q")
    for name in ("dvc.lock", "code.py"):
        Path(name).write_text("first")
    git("add", "dvc.lock", "code.py")
    git("commit", "-qm", "first")
    Path("dvc.lock").write_text("second")
    assert dirty() == "false"
    Path("code.py").write_text("second")
    assert dirty() == "true"


def test_an_epoch_is_logged_once_under_exactly_the_promised_names(
    client: MlflowClient, experiment: config.Experiment
) -> None:
    run_id = track.start_run(experiment, "vit")
    for epoch in (0, 1, 2):
        track.log_epochs(run_id, [EPOCH | {"epoch": epoch, "val/loss": 1.0}])
    assert track.start_run(experiment, "vit", resume=run_id) == run_id
    for epoch in (1, 2, 3):
        track.log_epochs(run_id, [EPOCH | {"epoch": epoch, "perf/img_per_s": 100.0, "val/ema_loss": 1.0}])
    assert client.get_run(run_id).data.metrics.keys() == EPOCH.keys() == set(track.EPOCH_METRICS)
    for key in EPOCH:
        assert [metric.step for metric in client.get_metric_history(run_id, key)] == [0, 1, 2, 3]


def test_the_average_is_logged_beside_the_weights(client: MlflowClient, experiment: config.Experiment) -> None:
    run_id = track.start_run(experiment, "vit")
    average = {"val/ema_loss": 0.2, "val/ema_top1_pct": 91.0, "val/ema_top5_pct": 99.0}
    track.log_epochs(run_id, [EPOCH | average | {"epoch": 0}])
    found = client.get_run(run_id).data.metrics
    assert {key: found[key] for key in found.keys() - EPOCH.keys()} == {
        "val/ema_top1_pct": 91.0,
        "val/ema_top5_pct": 99.0,
    }


def test_final_metrics_and_artifacts_come_later_through_run_json(
    client: MlflowClient, experiment: config.Experiment
) -> None:
    run_id = track.start_run(experiment, "vit")
    track.end_run(run_id, "finished")
    folder = Path("outputs/vit")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"mlflow_run_id": run_id}))
    (folder / "weights.safetensors").write_bytes(b"weights")
    track.log_results(
        track.find_run_id("vit"),
        {
            "complexity/params_m": 0.15,
            "best/top1_pct": 85.94000000000001,  # rounding noise, which the UI would show
            "perf/peak_mem_mb": None,
            "equivariance/max_rel_error": math.nan,
        },
        [folder / "weights.safetensors"],
    )
    run = client.get_run(run_id)
    assert run.data.metrics["complexity/params_m"] == 0.15 and "perf/peak_mem_mb" not in run.data.metrics
    assert run.data.metrics["best/top1_pct"] == 85.94
    assert math.isnan(run.data.metrics["equivariance/max_rel_error"])
    assert [artifact.path for artifact in client.list_artifacts(run_id)] == ["weights.safetensors"]
    assert list(Path("mlartifacts").rglob("weights.safetensors"))
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("status", "theirs"), [("finished", "FINISHED"), ("diverged", "FAILED"), ("interrupted", "KILLED")]
)
def test_the_status_of_a_run_is_tagged(
    client: MlflowClient, experiment: config.Experiment, status: str, theirs: str
) -> None:
    run_id = track.start_run(experiment, "vit")
    track.end_run(run_id, status)  # pyright: ignore[reportArgumentType]
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["status"]) == (theirs, status)


def test_a_deleted_database_is_a_warning(
    client: MlflowClient,
    experiment: config.Experiment,
    database: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gone = "0123456789abcdef" * 2
    with caplog.at_level(logging.WARNING, logger="pipeline.track"):
        track.log_epochs(gone, [EPOCH | {"epoch": 0}])
        track.log_results(gone, {"complexity/params_m": 1.0})
        track.end_run(gone, "finished")
        track.log_results(track.find_run_id("never-trained"), {"complexity/params_m": 1.0})
        assert track.start_run(experiment, "vit", resume=gone) != gone
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 5
    assert sum(gone in warning and "deleted meanwhile?" in warning for warning in warnings) == 4


def test_a_run_in_the_trash_counts_as_deleted(
    client: MlflowClient, experiment: config.Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = track.start_run(experiment, "vit")
    client.delete_run(run_id)
    track.log_results(run_id, {"complexity/params_m": 1.0})
    assert run_id in caplog.text
    assert track.start_run(experiment, "vit", resume=run_id) != run_id


def test_other_failures_are_not_hidden(client: MlflowClient, experiment: config.Experiment) -> None:
    run_id = track.start_run(experiment, "vit")
    with pytest.raises(Exception, match="Invalid value|not a valid|name"):
        track.log_results(run_id, {"not:a$name\n": 1.0})
