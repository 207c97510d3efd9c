"""`make repro` trains ahead of DVC: what DVC records of it, and what comes of a run that fails."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import cluster
from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml, read_yaml
from stages import repro, train_all
from tests.conftest import params_with_runs

ROOT = Path(__file__).resolve().parents[2]

# Stand-ins for the stages, which note that they ran. `train` takes over a training of exactly these parameters, and
# cannot train itself.
TRAIN = """
import sys
from pathlib import Path
from pipeline.base.yaml_files import read_yaml

name = sys.argv[1]
if not Path(f"trained-{name}-{read_yaml(Path('params.yaml'))['train']['amp']}").exists():
    sys.exit(f"{name} is not trained")
Path(f"outputs/{name}").mkdir(parents=True, exist_ok=True)
Path(f"outputs/{name}/run.json").write_text(name)
"""

DVC = """
stages:
  shard: {cmd: echo shard >> log, deps: [train.py]}
  recipe: {foreach: "${recipes}", do: {cmd: "echo recipe >> log", deps: [train.py]}}
  sweep_recipe: {cmd: echo sweep_recipe >> log, deps: [train.py]}
  sweep_hybrid: {cmd: echo sweep_hybrid >> log, deps: [train.py]}
  scaling: {cmd: echo scaling >> log, deps: [train.py]}
  paper_sizes: {cmd: echo paper_sizes >> log, deps: [train.py]}
  train:
    foreach: ${models}
    do:
      cmd: python train.py ${key} && echo train ${key} >> log
      params: [train]
      outs: ["outputs/${key}/run.json"]
  evaluate:
    foreach: ${models}
    do: {cmd: "echo evaluate ${key} >> log", deps: ["outputs/${key}/run.json"]}
  complexity: {cmd: echo complexity >> log, deps: [outputs]}
  throughput: {cmd: echo throughput >> log, deps: [outputs]}
  report: {cmd: echo report >> log, deps: [outputs]}
"""


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the pipeline in a new DVC project. `meanwhile` is called while the runs train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text("[core]\n    no_scm = true\n")
    Path("dvc.yaml").write_text(DVC)
    Path("train.py").write_text(TRAIN)
    Path("params.yaml").write_text(dump_yaml(params_with_runs("vit", "e-vit")))
    monkeypatch.setattr(cluster, "local_cluster", lambda cpus: contextlib.nullcontext())

    def train(meanwhile: Callable[[], object] = lambda: None, **statuses: int) -> int:
        def train_runs(names: list[str], experiment: config.Experiment) -> dict[str, int]:
            for name in names:
                if not statuses.get(name):
                    Path(f"trained-{name}-{experiment.train.amp}").touch()
            meanwhile()
            return {name: statuses.get(name, 0) for name in names}

        monkeypatch.setattr(train_all, "train_runs", train_runs)
        Path("log").write_text("")
        return repro._run_pipeline(config.load_experiment(), ["vit", "e-vit"], [])

    return train


def set_amp(amp: str | None) -> None:
    params = read_yaml(Path("params.yaml"))
    params["train"]["amp"] = amp
    Path("params.yaml").write_text(dump_yaml(params))


def log() -> list[str]:
    """The stages that ran, in order."""
    return Path("log").read_text().splitlines()


def recorded_amp() -> dict[str, str | None]:
    stages = read_yaml(Path("dvc.lock"))["stages"]
    return {name: stages[name]["params"]["params.yaml"]["train"]["amp"] for name in stages if name.startswith("train@")}


def test_an_edit_while_runs_train_is_never_recorded_as_what_they_were_trained_with(train):
    assert train(lambda: set_amp("bf16")) != 0
    assert recorded_amp() == {}
    assert not [line for line in log() if line.startswith(("train", "evaluate"))]
    assert train() == 0  # with the new parameters
    assert recorded_amp() == {"train@vit": "bf16", "train@e-vit": "bf16"}


def test_a_failed_run_does_not_keep_the_others_from_the_report(train, caplog):
    assert train(**{"e-vit": 3}) == 3
    ran = log()
    assert "evaluate vit" in ran and "evaluate e-vit" not in ran and "train e-vit" not in ran
    assert ran[-3:] == ["complexity", "throughput", "report"] and "sweep_hybrid" in ran
    assert "e-vit failed to train; the other runs are evaluated" in caplog.text
    assert list(recorded_amp()) == ["train@vit"]
