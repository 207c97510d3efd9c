"""Throughput ratios of neighbouring passes and their quartiles, in the table, the metrics and the sentences."""

from __future__ import annotations

import json

import pytest

from pipeline.reporting import page, table
from pipeline.reporting.speed import Quartiles, quartiles_of, ratios_of_passes
from tests.reporting.conftest import cells, load_results, write_fake_study

CONDITIONS = {"device": "cpu", "dtype": "float32", "batch_size": 8, "compiled": True}
X = {**CONDITIONS, "pass_s": [2.0, 4.0, 3.0]}  # the second pass of both was disturbed
E = {**CONDITIONS, "pass_s": [1.0, 2.5, 2.0]}


def test_a_ratio_is_the_median_over_neighbouring_passes_not_the_ratio_of_medians():
    ratios = ratios_of_passes(E, X)
    assert ratios == (2.0, 1.6, 1.5)
    assert quartiles_of(ratios) == pytest.approx(Quartiles(1.55, 1.6, 1.8))
    assert str(quartiles_of(ratios)) == "1.60 (1.55 to 1.80)"


@pytest.mark.parametrize("other", [{}, {**X, "batch_size": 16}, {**X, "compiled": False}, {**X, "dtype": "float16"}])
def test_passes_under_other_conditions_are_not_compared(other):
    assert ratios_of_passes(E, other) == ratios_of_passes(other, E) == ()


def test_quartiles_are_in_table_metrics_and_sentences(tmp_path):
    experiment = write_fake_study(tmp_path)
    row = cells(tmp_path, experiment)["e-vit"]
    assert (row["images/s"], row["throughput ratio"]) == ("24,000 (21,600–26,400)", "1.20 (1.20–1.23)")
    results = load_results(tmp_path, experiment)
    metrics = results["e-vit"].all_metrics()
    assert metrics["perf/throughput_ratio_q1"] == pytest.approx(1.2)
    assert metrics["perf/throughput_ratio_q3"] == pytest.approx(1.23)
    bounds = [metrics[f"perf/forward_img_per_s_{side}"] for side in ("q1", "q3")]
    assert bounds == pytest.approx([21_600, 26_400])
    [sentence] = [s for s in table.summarize_runs(list(results.values())) if s.startswith("e-vit:")]
    assert "1.20 (1.20 to 1.23) times its throughput" in sentence


def test_passes_of_all_seeds_count_together(tmp_path):
    from pipeline.reporting.run_results import pooled_throughput_ratio

    results = load_results(tmp_path, write_fake_study(tmp_path))
    assert pooled_throughput_ratio([results["e-vit"], results["h-vit"]]) == quartiles_of(
        (*results["e-vit"].throughput_ratios, *results["h-vit"].throughput_ratios)
    )
    assert pooled_throughput_ratio([results["vit"]]) is None


def test_times_are_of_one_image(tmp_path):
    experiment = write_fake_study(tmp_path)
    path = tmp_path / "reports/throughput.json"
    entries = json.loads(path.read_text())
    entries[0]["pass_s"] = [0.064, 0.128, 0.064]
    path.write_text(json.dumps(entries))
    assert load_results(tmp_path, experiment)["vit"].ms_per_img == [1.0, 2.0, 1.0]


def test_a_network_that_does_not_fit_the_gpu_is_in_the_report_without_a_speed(tmp_path):
    experiment = write_fake_study(tmp_path)
    path = tmp_path / "reports/throughput.json"
    entries = json.loads(path.read_text())
    unknown = {"img_per_s": None, "img_per_s_quartiles": None, "pass_s": [], "peak_mem_mb": None, "alternated": False}
    entries[0] |= unknown
    path.write_text(json.dumps(entries))
    results = load_results(tmp_path, experiment)
    assert results["vit"].img_per_s is None and results["e-vit"].img_per_s is not None
    assert results["e-vit"].throughput_ratios == () == results["vit"].throughput_ratios
    assert "perf/throughput_ratio" not in results["e-vit"].all_metrics()
    _, written = page.write_report(experiment, list(results.values()), tmp_path / "reports")
    assert "vit" in written.read_text()
