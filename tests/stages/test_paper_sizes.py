"""The stage `paper_sizes`: what it measures and what it writes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from flopeq.measure import comparison
from flopeq.measure.throughput import Protocol
from pipeline.base import config
from pipeline.base.yaml_files import read_yaml
from pipeline.reporting.paper_sizes import load_measurements
from stages import paper_sizes
from tests.measure.test_comparison import SIZE, build_small

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def switch(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    experiment = config.load_experiment()
    throughput = experiment.throughput.model_copy(update={"paper_sizes": on})
    changed = experiment.model_copy(update={"throughput": throughput})
    monkeypatch.setattr(config, "load_experiment", lambda: changed)


def test_off_writes_an_empty_list_and_measures_nothing(folder, monkeypatch):
    switch(monkeypatch, on=False)
    monkeypatch.setattr(comparison, "measure_table1", None)  # a call would raise
    paper_sizes.run()
    assert json.loads((folder / "reports/paper_sizes.json").read_text()) == []


def test_on_measures_x_and_e_of_every_s_size(folder, monkeypatch, caplog):
    """With small networks of the same names, on the CPU."""
    protocol = Protocol(batch_size=2, warmup=0, runs=3, dtype=torch.float32, compile=False)
    switch(monkeypatch, on=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("flopeq.measure.throughput.protocol_for", lambda _: protocol)
    monkeypatch.setattr(comparison.measure_table1, "__defaults__", (None, SIZE, build_small))
    caplog.set_level(logging.INFO)
    paper_sizes.run()
    rows = json.loads((folder / "reports/paper_sizes.json").read_text())
    assert [row["model"] for row in rows] == [name for row in comparison.select_rows(["S"]) for name in (row.model,)]
    assert {row["device"] for row in rows} == {"cpu"} and all(len(row["date"]) == 10 for row in rows)
    assert all(row["throughput_ratio"] for row in rows if row["variant"] == "E")
    assert "paper sizes: warming up deit3_small_patch16_224 (3 of 6)" in caplog.messages
    [found] = load_measurements(folder / "reports", folder / "results")
    assert found.is_this_machine and len(found.comparisons) == 3


def test_it_does_not_run_again_after_a_training():
    stage = read_yaml(ROOT / "dvc.yaml")["stages"]["paper_sizes"]
    assert not [path for path in stage["deps"] if path.startswith(("outputs", "data", "reports"))]
    assert set(stage["params"]) == {"throughput.paper_sizes", "train.gpu"}
