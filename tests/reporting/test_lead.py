"""What the report leads with: the paragraph and its figure."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from pipeline.base.yaml_files import read_yaml
from pipeline.reporting.lead import lead_sentences
from pipeline.reporting.lead_figure import draw_lead_figure
from pipeline.reporting.paper_sizes import Measurement
from tests.reporting.conftest import NUM_IMAGES, ROOT, TOP1, diverge, load_results, write_fake_study, write_hits

FLOPS = (1e6, "MFLOPs")
MEASUREMENT = Measurement("a device", "float32", "quartiles", True, ())


def hits(num_right, num_images=NUM_IMAGES):
    return np.arange(num_images) < num_right


def test_the_paragraph_says_costs_differences_with_verdicts_and_speed(tmp_path):
    experiment = write_fake_study(tmp_path)
    for run, right in {"vit": 960, "e-vit": 900, "resmlp": 900, "e-resmlp": 960, "convnext": 950}.items():
        write_hits(tmp_path / "outputs" / run, hits(right))
    write_hits(tmp_path / "outputs/e-convnext", np.roll(hits(951), 25))  # 25 images each that only one side gets right
    results = load_results(tmp_path, experiment)
    cost, top1, speed, small = lead_sentences(list(results.values()), [MEASUREMENT])
    assert cost == "E(X) takes 0.55 of the FLOPs of X."
    pooled = results["e-vit"].pooled
    assert pooled and pooled.minus_baseline
    low, high = pooled.minus_baseline.interval
    assert f"ViT -6.00 ({low:+.2f} to {high:+.2f}), worse" in top1 and high < 0
    assert "ResMLP +6.00 (" in top1 and top1.count("better") == 1
    assert "ConvNeXt (iso.) +0.10 (" in top1 and top1.endswith("cannot be told apart.")
    assert "ViT 1.20 (1.20 to 1.23); ResMLP 1.20" in speed and "(cpu, float32, batch 64, compiled)" in speed
    assert small.startswith("Networks of this size say nothing about the speed") and "measured below" in small
    assert "below" not in lead_sentences(list(results.values()), [])[-1]


def test_networks_of_the_papers_size_are_not_called_small(tmp_path):
    results = load_results(tmp_path, write_fake_study(tmp_path))
    large = [result.__class__(**{**vars(result), "flops": 4 * 10**9}) for result in results.values()]
    assert not [sentence for sentence in lead_sentences(large, [MEASUREMENT]) if "this size" in sentence]


def test_without_an_e_there_is_no_paragraph(tmp_path):
    results = load_results(tmp_path, write_fake_study(tmp_path))
    assert lead_sentences([results["vit"], results["h-vit"]], [MEASUREMENT]) == []


def test_a_pair_has_the_name_of_e_where_x_has_several(tmp_path):
    model = read_yaml(ROOT / "params.yaml")["models"]["e-vit"]
    more = {"e-vit-head": {**model, "args": {**model["args"], "head": "even+abs_odd"}}}
    results = load_results(tmp_path, write_fake_study(tmp_path, more))
    top1 = lead_sentences(list(results.values()), [])[1]
    assert "e-vit -2.50 (" in top1 and "e-vit-head -1.60 (" in top1 and "ResMLP -0.60 (" in top1


def test_seeds_are_one_point_with_the_interval_over_seeds(tmp_path):
    models = read_yaml(ROOT / "params.yaml")["models"]
    seeds = {f"{run}-seed{seed}": {**models[run], "seed": seed} for run in ("vit", "e-vit") for seed in (1, 2)}
    experiment = write_fake_study(tmp_path, seeds)
    diverge(tmp_path / "outputs/e-vit-seed2")
    results = load_results(tmp_path, experiment)
    figure = draw_lead_figure(list(results.values()), FLOPS)
    assert figure.svg.count('class="mark"') == 2 * len(TOP1), "in each of the two panels"
    pooled = results["e-vit"].pooled
    assert pooled
    low, high = pooled.top1_interval
    assert low < pooled.top1_pct < high
    top1 = f"{pooled.top1_pct:.4g} ({low:.4g} to {high:.4g})"
    assert f"e-vit, 2 of 3 seeds: MFLOPs per image 1.2; validation top-1 (%) {top1}" in figure.svg


def test_the_data_of_the_figure_has_a_row_per_run_with_bounds(tmp_path):
    results = load_results(tmp_path, write_fake_study(tmp_path))
    figure = draw_lead_figure(list(results.values()), FLOPS)
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(figure.csv))}
    assert set(rows) == set(TOP1)
    bounds = [float(rows["e-vit"][f"val/top1{side}_pct"]) for side in ("_low", "", "_high")]
    assert bounds == sorted(bounds) and bounds[1] == TOP1["e-vit"]
    speeds = [float(rows["e-vit"][f"perf/forward_img_per_s{side}"]) for side in ("_q1", "", "_q3")]
    assert speeds == pytest.approx([21_600, 24_000, 26_400])


def test_the_page_shows_both_panels_and_the_png_has_them_side_by_side(tmp_path):
    figure = draw_lead_figure(list(load_results(tmp_path, write_fake_study(tmp_path)).values()), FLOPS)
    assert figure.svg.count("<svg ") == 2 and "µs per image, measured" in figure.svg
    width, height = (int.from_bytes(figure.png[start : start + 4], "big") for start in (16, 20))  # PNG's header
    assert width > 2 * height


@pytest.mark.parametrize(("top1", "says"), [(19.7, "e-vit † at 20%"), (96.1, None)])
def test_a_run_that_did_not_converge_is_hollow_and_labelled(tmp_path, top1, says):
    experiment = write_fake_study(tmp_path)
    if says:
        diverge(tmp_path / "outputs/e-vit")
        write_hits(tmp_path / "outputs/e-vit", hits(round(10 * top1)))
    figure = draw_lead_figure(list(load_results(tmp_path, experiment).values()), FLOPS)
    assert ("Hollow" in figure.caption) is bool(says)
    assert ("†" in figure.svg) is bool(says)
