"""Symmetrized runs in the report: beside X, E and H, compared with X, and E with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.base.config import Experiment
from pipeline.base.yaml_files import read_yaml
from pipeline.reporting import page, run_results, table
from pipeline.reporting.lead import lead_sentences
from tests.reporting.conftest import ROOT, cells, load_results, set_top1, write_fake_study, write_json


@pytest.fixture
def study(tmp_path: Path) -> Experiment:
    """The committed runs and S(X) of the ViT, which is better than X."""
    experiment = write_fake_study(tmp_path, symmetrized={"vit-sym": {"weights_of": "vit", "group": "flop"}})
    set_top1(tmp_path / "outputs/vit-sym", 99.4)
    return experiment


def test_a_symmetrized_run_is_a_row_with_its_costs_and_differences(study: Experiment, tmp_path: Path) -> None:
    rows = cells(tmp_path, study)
    sym, e_vit = rows["vit-sym"], rows["e-vit"]
    assert (sym["model"], sym["variant"], sym["FLOP ratio"], sym["MFLOPs"]) == ("S(ViT)", "S", "0.50", "4.40")
    assert sym["throughput ratio"].startswith("0.45") and sym["share %"] == "–"
    assert sym["top-1 minus X's"].startswith("+0.80 (") and sym["top-1 minus S(X)'s"] == "–"
    assert e_vit["top-1 minus X's"].startswith("-2.50 (") and e_vit["top-1 minus S(X)'s"].startswith("-3.30 (")
    assert rows["h-vit"]["top-1 minus S(X)'s"].startswith("-1.10 (")
    assert rows["e-resmlp"]["top-1 minus S(X)'s"] == "–", "no S of its X"


def test_a_study_without_symmetrized_runs_has_no_such_column(tmp_path: Path) -> None:
    assert "top-1 minus S(X)'s" not in cells(tmp_path, write_fake_study(tmp_path))["e-vit"]


def test_sentences_compare_s_with_x_and_e_with_s(study: Experiment, tmp_path: Path) -> None:
    results = list(load_results(tmp_path, study).values())
    sentences = {s.partition(":")[0]: s for s in table.summarize_runs(results)}
    assert "2.00 of the FLOPs of vit, 0.45 " in sentences["vit-sym"]
    assert "99.4% against 98.6%: better (+0.80 points" in sentences["vit-sym"]
    against = sentences["e-vit, against the symmetrized X"]
    assert "0.27 of the FLOPs of vit-sym, top-1 96.1% against 99.4%: worse (-3.30 points" in against
    lead = lead_sentences(results, [])
    assert "S(X), the weights of X averaged over a group without training, takes 2.00 of the FLOPs of X." in lead
    assert any(s.startswith("Top-1 of S(X) minus that of X: ViT +0.80 (") and s.endswith(", better.") for s in lead)
    assert any(s.startswith("Top-1 of E(X) minus that of S(X): ViT -3.30 (") and s.endswith(", worse.") for s in lead)
    pairs = [(c.label, c.baseline_label) for c in run_results.compare_runs(results)]
    assert {("vit-sym", "vit"), ("e-vit", "vit-sym"), ("h-vit", "vit-sym")} <= set(pairs)


def test_seeds_of_a_symmetrized_run_are_one_row(tmp_path: Path) -> None:
    vit = read_yaml(ROOT / "params.yaml")["models"]["vit"]
    rows = {f"vit-sym{end}": {"weights_of": f"vit{end}", "group": "flop"} for end in ("", "-seed1")}
    other = {"vit-chosen": {"weights_of": "vit-seed1", "group": "flop", "how": "choose"}}
    experiment = write_fake_study(tmp_path, {"vit-seed1": {**vit, "seed": 1}}, rows | other)
    results = load_results(tmp_path, experiment)
    assert [results[name].group for name in ("vit-sym", "vit-sym-seed1", "vit-chosen")] == ["vit-sym"] * 2 + [
        "vit-chosen"
    ]
    assert [results[name].seed for name in ("vit-sym", "vit-sym-seed1")] == [0, 1]
    assert results["vit-sym-seed1"].baseline == "vit-seed1" and results["e-vit"].symmetrized_baseline == "vit-sym"
    found = results["vit-sym"].pooled
    assert (
        found
        and found.minus_baseline
        and found.minus_baseline.num_seeds == found.minus_baseline.num_baseline_seeds == 2
    )


def test_page_card_and_metrics_show_the_symmetrized_run(study: Experiment, tmp_path: Path) -> None:
    results = load_results(tmp_path, study)
    write_json(tmp_path / "outputs/vit-sym/config.yaml")
    page.write_report(study, list(results.values()), tmp_path / "reports", tmp_path / "sweeps", tmp_path / "outputs")
    card = (tmp_path / "reports/cards/vit-sym.md").read_text()
    assert "# vit-sym: S(ViT)" in card and "invariant under the group `flop`" in card
    assert "$ flopeq symmetrize --run outputs/vit --group 'flop' --how average exported/vit-sym" in card.replace(
        str(tmp_path) + "/", ""
    )
    assert "those of `vit`'s `weights.safetensors`" in card and "It cannot tell an image from" in card
    markdown = (tmp_path / "reports/report.md").read_text()
    assert "group flop, average" in markdown and "S(ViT)" in markdown
    metrics = results["e-vit"].all_metrics()
    assert metrics["difference/to_symmetrized_pct"] == pytest.approx(-3.3)
    assert metrics["difference/to_symmetrized_low_pct"] < -3.3 < metrics["difference/to_symmetrized_high_pct"]
    assert "top-1 minus that of S(X), same images" in (tmp_path / "reports/cards/e-vit.md").read_text()


def test_a_symmetrized_network_from_outside_the_study_has_a_name(tmp_path: Path) -> None:
    resnet = {"model": "resnet18", "recipe": "digits"}
    symmetrized = {"resnet-sym": {"weights_of": "resnet", "group": "d4", "how": "canonical"}}
    experiment = write_fake_study(tmp_path, {"resnet": resnet}, symmetrized)
    found = load_results(tmp_path, experiment)["resnet-sym"]
    assert (found.name, found.variant, found.family, found.baseline) == ("S(resnet18)", "S", None, "resnet")
