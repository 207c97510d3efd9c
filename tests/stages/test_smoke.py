"""`stages.smoke`: the experiment that it runs, and its verdicts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml
from pipeline.training import recipe
from stages import smoke
from tests.conftest import ROOT


@pytest.mark.parametrize(("num_gpus", "workers", "batch"), [(0, 1, 64), (1, 1, 64), (8, 8, 128), (32, 32, 512)])
def test_every_gpu_has_a_worker(num_gpus, workers, batch, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "params.yaml").write_text(dump_yaml(smoke.smoke_params(num_gpus)))
    experiment = config.load_experiment(tmp_path / "params.yaml")
    recipe.check_recipe(experiment.recipe("vit"), experiment.data, experiment.train)
    assert experiment.train.workers == workers and experiment.recipe("vit").global_batch_size == batch
    assert (experiment.train.amp, experiment.train.compile) == (("bf16", True) if num_gpus else (None, False))
    assert experiment.sweeps.recipe.runs == ("vit",) and experiment.sweeps.recipe.trials == 1


def test_each_check_has_a_verdict_and_a_failed_one_stops_no_other(tmp_path: Path, monkeypatch, caplog):
    """Stages are stood in for by a command that fails, or that leaves what they write."""
    monkeypatch.setattr(smoke.sys, "executable", str(stand_in(tmp_path)))
    caplog.set_level(logging.INFO)
    passed = {name: smoke._verdict(name, check) for name, check in smoke.checks(tmp_path, 0)}
    assert passed == {"data": True, "training": True, "sweep trial": False, "evaluate": False, "throughput": True}
    said = caplog.text
    assert "1 workers, 900 images/s, waited for data 3% of the time, top-1 91.0%" in said
    assert "CheckFailedError: it exits with 2: error: no trial" in said
    assert "top-1 is 50.0%, and training found 91.0%" in said
    assert caplog.messages[0].startswith("ok    data") and caplog.messages[2].startswith("FAIL  sweep trial")


def stand_in(folder: Path) -> Path:
    """A program that is called as `python -m stages.<name>`."""
    history = "epoch,val/top1_pct,perf/img_per_s,perf/data_wait_pct\\n0,91.0,900.0,3.0"
    script = folder / "python"
    script.write_text(
        f"""#!/bin/sh
case "$2" in
  stages.train) mkdir -p outputs/vit; printf '{history}' > outputs/vit/history.csv
    echo '{json.dumps({"status": "finished", "compiled": False})}' > outputs/vit/run.json;;
  stages.sweep_recipe) echo 'error: no trial' >&2; exit 2;;
  stages.evaluate) echo '{json.dumps({"val/top1_pct": 50.0})}' > outputs/vit/metrics.json;;
  stages.throughput) mkdir -p reports
    echo '{json.dumps([{"run": "vit", "img_per_s": 5.0, "device": "cpu"}])}' > reports/throughput.json;;
esac
"""
    )
    script.chmod(0o755)
    return script
