"""Networks for larger groups in the report: compared with X, and called by their group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base.config import Experiment
from pipeline.base.yaml_files import read_yaml
from pipeline.reporting import page, table
from pipeline.reporting.lead import lead_sentences
from tests.reporting.conftest import NUM_IMAGES, ROOT, cells, load_results, write_fake_study, write_hits

VIT = read_yaml(ROOT / "params.yaml")["models"]["vit"]

RUNS: dict[str, Any] = {
    "mirrors-vit": {**VIT, "model": f"mirrors_{VIT['model']}"},
    "octic-vit": {**VIT, "model": f"octic_{VIT['model']}"},
    "graded-vit": {**VIT, "model": f"octic_{VIT['model']}", "args": {**VIT["args"], "symmetry": "d4:1,c2:2"}},
}

SYMMETRIZED = {"vit-sym": {"weights_of": "vit", "group": "flop"}, "vit-octic": {"weights_of": "vit", "group": "d4"}}


@pytest.fixture
def study(tmp_path: Path) -> Experiment:
    experiment = write_fake_study(tmp_path, RUNS, SYMMETRIZED)
    for run, right in {"mirrors-vit": 990, "octic-vit": 900, "graded-vit": 985}.items():
        write_hits(tmp_path / "outputs" / run, np.arange(NUM_IMAGES) < right)
    return experiment


def test_rows_name_the_group_and_compare_with_x(study: Experiment, tmp_path: Path) -> None:
    rows = cells(tmp_path, study)
    found = {run: [rows[run][column] for column in ("model", "variant", "FLOP ratio")] for run in RUNS}
    assert found == {
        "mirrors-vit": ["C2xC2(ViT)", "C2xC2", "3.14"],
        "octic-vit": ["D4(ViT)", "D4", "3.67"],
        "graded-vit": ["d4:1,c2:2(ViT)", "graded", "2.44"],
    }
    assert rows["mirrors-vit"]["top-1 minus X's"].startswith("+0.40 (")
    assert rows["octic-vit"]["top-1 minus X's"].startswith("-8.60 (")
    sentences = table.summarize_runs(list(load_results(tmp_path, study).values()))
    assert any(s.startswith("graded-vit: 0.41 of the FLOPs of vit, 1.30 (") for s in sentences)


def test_a_network_is_compared_with_x_symmetrized_over_its_group(study: Experiment, tmp_path: Path) -> None:
    found = {run: result.symmetrized_baseline for run, result in load_results(tmp_path, study).items()}
    assert (found["e-vit"], found["octic-vit"], found["mirrors-vit"]) == ("vit-sym", "vit-octic", "vit-sym")


def test_the_paragraph_has_every_group(study: Experiment, tmp_path: Path) -> None:
    sentences = lead_sentences(list(load_results(tmp_path, study).values()), [])
    assert "C2xC2(X) takes 0.32 of the FLOPs of X." in sentences
    assert any(s.startswith("Top-1 of D4(X) minus that of X, in points") and "ViT -8.60 (" in s for s in sentences)
    assert any(s.startswith("Images per second of C2xC2(X) over those of X") and "ViT 1.40" in s for s in sentences)
    assert sentences.index("E(X) takes 0.55 of the FLOPs of X.") == 0
    assert sum(s.startswith("Networks of this size") for s in sentences) == 1


def test_the_report_says_what_images_with_an_up_mean_for_larger_groups(study: Experiment) -> None:
    data = study.data.model_copy(update={"flop_invariant": True})
    [note] = page.symmetry_notes(study.model_copy(update={"data": data}))
    assert "have an up" in note and "(mirrors-vit, octic-vit, graded-vit)" in note
    without_up = data.model_copy(update={"has_up": False})
    assert page.symmetry_notes(study.model_copy(update={"data": without_up})) == []
    assert page.symmetry_notes(study.model_copy(update={"data": data, "models": {"vit": study.models["vit"]}})) == []


def test_cards_and_figures_take_networks_for_larger_groups(study: Experiment, tmp_path: Path) -> None:
    results = list(load_results(tmp_path, study).values())
    page.write_report(study, results, tmp_path / "reports", tmp_path / "sweeps", tmp_path / "outputs")
    card = (tmp_path / "reports/cards/graded-vit.md").read_text()
    assert "# graded-vit: d4:1,c2:2(ViT)" in card and "It cannot tell an image from its copies under the group" in card
    assert "mirrored or turned copies: do not use it" in (tmp_path / "reports/cards/octic-vit.md").read_text()
    assert "D4(X), octic" in (tmp_path / "reports/index.html").read_text()
