"""The section on the paper's S sizes: this machine's rows, those of GPUs in results/, and what is not shown."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from flopeq.measure.comparison import ComparisonRow, save_rows
from flopeq.measure.paper import Table1Row, table1
from pipeline.reporting import page
from pipeline.reporting.paper_sizes import load_measurements
from pipeline.reporting.paper_sizes_section import make_section
from tests.reporting.conftest import ROOT, load_results, write_fake_study


def make_row(paper: Table1Row, **changes: object) -> ComparisonRow:
    """A row of the paper's network: X at 10 images/s, all others at 15, with 0.5 of X's FLOPs."""
    is_x = paper.variant == "X"
    columns = {field.name: None for field in dataclasses.fields(ComparisonRow)} | {
        **{key: getattr(paper, key) for key in ("paper_name", "model", "family", "size", "variant")},
        "params": 1, "flops": 10 if is_x else 5, "macs": 1, "status": "ok", "img_per_s": 10.0 if is_x else 15.0,
        "flop_ratio": None if is_x else 2.0, "throughput_ratio": None if is_x else 1.5,
        "throughput_ratio_q1": None if is_x else 1.4, "throughput_ratio_q3": None if is_x else 1.6,
        "alternating": True, "paper_params_m": 1.0, "paper_gflops": 1.0, "device": "cpu", "hardware": "A CPU",
        "threads": 2, "dtype": "float32", "batch_size": 8, "mode": "forward", "compiled": True,
        "fused_attention": True, "warmup": 2, "runs": 10, "python": "3.11", "torch": "2.14.1", "timm": "1.0.31",
        "flopeq": "source",
    }  # fmt: skip
    return ComparisonRow(**(columns | changes))  # pyright: ignore[reportArgumentType]


def rows_of(*sizes: str, **changes: object) -> list[ComparisonRow]:
    return [make_row(row, **changes) for row in table1() if row.size in sizes]


def write_stage_output(reports: Path, rows: list[ComparisonRow]) -> None:
    reports.mkdir(parents=True, exist_ok=True)
    content = [dataclasses.asdict(row) | {"date": "2026-11-27"} for row in rows]
    (reports / "paper_sizes.json").write_text(json.dumps(content))


def test_this_machine_has_a_row_per_family_with_ratio_and_share(tmp_path):
    write_stage_output(tmp_path / "reports", rows_of("S"))
    [found] = load_measurements(tmp_path / "reports", tmp_path / "results")
    assert found.is_this_machine and found.device == "A CPU, 2 threads"
    assert found.conditions == "float32, batch 8, compiled, torch 2.14.1, timm 1.0.31, 2026-11-27"
    assert [pair.x_name for pair in found.comparisons] == ["ViT-S", "ResMLP-S24", "ConvNeXt-S (iso.)"]
    assert all(pair.ratio == (1.4, 1.5, 1.6) and pair.share == 0.75 for pair in found.comparisons)


@pytest.mark.parametrize("content", [None, "[]"])
def test_without_measurements_there_is_no_section(tmp_path, content):
    if content:
        (tmp_path / "paper_sizes.json").write_text(content)
    assert load_measurements(tmp_path, tmp_path / "results") == [] and make_section([]) is None


def test_a_network_that_did_not_fit_is_left_out(tmp_path):
    rows = [
        dataclasses.replace(row, status="out of memory", img_per_s=None, throughput_ratio=None)
        if row.family == "vit"
        else row
        for row in rows_of("S")
    ]
    write_stage_output(tmp_path, rows)
    [found] = load_measurements(tmp_path, tmp_path)
    assert [pair.family for pair in found.comparisons] == ["resmlp", "convnext_iso"]


def test_networks_that_did_not_alternate_have_a_ratio_without_bounds(tmp_path):
    rows = [dataclasses.replace(row, throughput_ratio_q1=None, throughput_ratio_q3=None) for row in rows_of("S")]
    write_stage_output(tmp_path, rows)
    [found] = load_measurements(tmp_path, tmp_path)
    assert {pair.ratio for pair in found.comparisons} == {(1.5, 1.5, 1.5)}


def test_results_give_rows_of_gpus_only(tmp_path):
    gpu = {"device": "A GPU", "hardware": "A GPU", "threads": None, "dtype": "float16", "batch_size": 64}
    save_rows(tmp_path / "table1-cpu.csv", rows_of("S"))
    save_rows(tmp_path / "table1-gpu-train.csv", rows_of("S", mode="train", **gpu))
    save_rows(tmp_path / "table1-gpu.csv", rows_of("S", "B", **gpu))
    [found] = load_measurements(tmp_path / "reports", tmp_path)
    assert (found.device, found.is_this_machine, len(found.comparisons)) == ("A GPU", False, 3)
    assert found.conditions.startswith("float16, batch 64, compiled")


def test_the_committed_rows_of_an_h100_are_shown_as_its_own(tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    [found] = load_measurements(tmp_path / "reports", tmp_path / "results")
    vit, resmlp, convnext = found.comparisons
    assert found.device == "NVIDIA H100 80GB HBM3" and not found.is_this_machine
    assert found.conditions == "float16, batch 64, compiled, torch 2.11.0+cu130, 2026-11-27"
    assert vit.ratio == (0.8173, 0.8671, 0.8775) and "lowest to highest" in found.bounds
    assert vit.e_img_per_s == pytest.approx(64 / 3.7531e-3)
    flop_ratios = [pair.flop_ratio for pair in (vit, resmlp, convnext)]
    assert flop_ratios == pytest.approx([1.80, 1.95, 1.93], abs=0.005)  # docs/performance.md


def test_the_page_says_which_device_each_row_is_from(tmp_path):
    experiment = write_fake_study(tmp_path)
    write_stage_output(tmp_path / "reports", rows_of("S"))
    results = list(load_results(tmp_path, experiment).values())
    _, path = page.write_report(experiment, results, tmp_path / "reports", measured=ROOT / "results")
    content, markdown = path.read_text(), (tmp_path / "reports/report.md").read_text()
    for text in (content, markdown):
        assert "this machine (A CPU, 2 threads)" in text and "NVIDIA H100 80GB HBM3" in text
        assert text.index("accuracy_vs_cost") < text.index("paper_sizes.png") < text.index("All runs")
    assert content.count('data-run="E(ViT-S) on A CPU, 2 threads"') == 2, "the bar and its row answer to each other"
    assert "At the paper&#39;s sizes on this machine" in content and "measured below" in content
    assert "| ViT-S | this machine | 10.0 | 15.0 | 1.50 (1.40–1.60) | 2.00 | 75 |" in markdown
    assert "| ViT-S | NVIDIA H100 80GB HBM3 | 19,757 | 17,053 | 0.87 (0.82–0.88) | 1.80 | 48 |" in markdown


def test_the_page_has_no_such_section_without_either(tmp_path):
    experiment = write_fake_study(tmp_path)
    results = list(load_results(tmp_path, experiment).values())
    _, path = page.write_report(experiment, results, tmp_path / "reports", measured=tmp_path / "results")
    assert "paper_sizes" not in path.read_text() and "measured below" not in path.read_text()
    assert not (tmp_path / "reports/figures/paper_sizes.png").exists()
