"""`make repro RUNS=...`: what else runs for a part of the experiment."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from flopeq.measure.throughput import ProgressCallback
from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml, read_yaml
from stages import complexity, repro, throughput

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project with the committed experiment, in which the digits are sharded and `vit` is trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # stages say `python`
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    for name in ("flopeq", "pipeline", "stages", "dvc.yaml", "params.yaml"):
        Path(name).symlink_to(ROOT / name)
    shards = Path(config.load_experiment().data.shards)
    shards.mkdir(parents=True)
    manifest = {"location": None, "shards": {}, "indices": {}, "counts": {}, "classes": [*"0123456789"]}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    Path("outputs/vit").mkdir(parents=True)
    Path("outputs/vit/metrics.json").write_text(json.dumps({"val/top1_pct": 98.0, "converged": True}))
    return tmp_path


def test_named_runs_are_counted_without_training_the_others(project, monkeypatch, capsys):
    up_to_date = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(repro.subprocess, "run", lambda *_: up_to_date)  # `dvc status` of the named run
    repro.run("--runs", "vit")
    assert [path.name for path in Path("outputs").iterdir()] == ["vit"]
    printed = capsys.readouterr().out
    assert all(number in printed for number in ("165", "2.98", "98.0")) and "e-vit" not in printed
    assert "`dvc repro --single-item throughput`" in printed.splitlines()[-1]


def test_runs_that_are_not_trained_are_counted_without_a_warning(project, caplog):
    complexity.run()
    counted = json.loads(Path("reports/complexity.json").read_text())
    assert [entry["run"] for entry in counted] == list(config.load_experiment().models)
    assert not caplog.records


@pytest.mark.parametrize(
    ("status", "evaluated"), [(0, ["symmetrize@vit-sym", "evaluate@e-vit"]), (1, ["evaluate@e-vit"])]
)
def test_a_symmetrized_run_needs_the_training_of_its_weights_only(project, monkeypatch, status, evaluated):
    params = read_yaml(Path("params.yaml")) | {"symmetrized": {"vit-sym": {"weights_of": "vit", "group": "flop"}}}
    Path("params.yaml").unlink()
    Path("params.yaml").write_text(dump_yaml(params))
    trained, targets = [], []
    outdated = json.dumps({f"train@{name}": [] for name in ("vit", "e-vit", "resmlp")})
    monkeypatch.setattr(repro.subprocess, "run", lambda *_: subprocess.CompletedProcess([], 1))  # it is out of date
    monkeypatch.setattr(repro.subprocess, "check_output", lambda *_: outdated)
    monkeypatch.setattr(repro.cluster, "local_cluster", lambda *_: nullcontext())
    monkeypatch.setattr(repro.train_all, "train_runs", lambda names, _: trained.extend(names) or {"vit": status})
    monkeypatch.setattr(repro, "_try_dvc", lambda *words: targets.extend(words[2:]) or [])
    for module, name in (
        (repro.check, "run"),
        (repro, "check_git"),
        (repro, "_run_dvc"),
        (repro.report, "print_report"),
    ):
        monkeypatch.setattr(module, name, lambda *_: None)
    with pytest.raises(SystemExit) if status else nullcontext():
        repro.run("--runs", "vit-sym", "e-vit")
    assert trained == ["vit", "e-vit"]
    assert targets == evaluated


@pytest.mark.parametrize(("compile", "action"), [(True, "compiling and warming up"), (False, "warming up")])
def test_throughput_names_each_model_once_before_it_warms_up(project, monkeypatch, caplog, compile, action):
    names = ["e-vit", "vit"]

    def measure(builders: dict, *, on_progress: ProgressCallback, **settings: object) -> tuple[dict, bool]:
        assert list(builders) == ["e-vit", "vit"]
        for number in range(4):
            on_progress(names[number % 2], number, 4)
        return dict.fromkeys(builders), True

    experiment = config.load_experiment()
    experiment = experiment.model_copy(
        update={
            "models": {name: experiment.models[name] for name in names},
            "throughput": experiment.throughput.model_copy(update={"compile": compile}),
        }
    )
    monkeypatch.setattr(config, "load_experiment", lambda: experiment)
    monkeypatch.setattr("pipeline.evaluation.throughput.measure_throughput_if_fits", measure)
    caplog.set_level(logging.INFO)
    throughput.run()
    assert caplog.messages[:2] == [f"throughput: {action} e-vit (1 of 2)", f"throughput: {action} vit (2 of 2)"]
