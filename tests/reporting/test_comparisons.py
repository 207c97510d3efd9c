"""Which runs are compared, over which images, and what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base import config
from pipeline.base.yaml_files import dump_yaml, read_yaml
from pipeline.evaluation.pairing import PairingError
from pipeline.reporting import page, run_results, table
from tests.conftest import params_with_runs
from tests.reporting import conftest
from tests.reporting.conftest import NUM_IMAGES, ROOT, cells, load_results, set_top1, write_fake_study, write_hits


def with_seeds(*runs: str) -> dict[str, Any]:
    models = read_yaml(ROOT / "params.yaml")["models"]
    return {f"{run}-seed{seed}": {**models[run], "seed": seed} for run in runs for seed in (1, 2)}


def test_the_sentences_say_what_the_interval_allows_and_not_the_sign(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path)
    set_top1(tmp_path / "outputs/e-resmlp", 99.4)
    sentences = {
        s.partition(":")[0]: s for s in table.summarize_runs(list(load_results(tmp_path, experiment).values()))
    }
    assert sentences.keys() == {"e-vit", "h-vit", "e-resmlp", "e-convnext"}
    assert "top-1 96.1% against 98.6%: worse (-2.50 points, 95% interval -3." in sentences["e-vit"]
    assert sentences["e-vit"].endswith("; McNemar's p <0.001).")
    assert "98.3% against 98.6%: cannot be told apart (-0.30 points, 95% interval -0.70 to 0.00" in sentences["h-vit"]
    assert sentences["h-vit"].endswith("; McNemar's p 0.25).")
    assert "99.4% against 97.8%: better (+1.60 points, 95% interval +" in sentences["e-resmlp"]


def test_the_table_has_the_difference_with_its_interval_beside_the_top_1(tmp_path: Path) -> None:
    rows = cells(tmp_path, write_fake_study(tmp_path))
    assert (rows["h-vit"]["top-1 minus X's"], rows["h-vit"]["McNemar's p"]) == ("-0.30 (-0.70 to 0.00)", "0.25")
    assert (rows["vit"]["top-1 minus X's"], rows["vit"]["McNemar's p"]) == ("–", "–")


def test_seeds_are_compared_together_and_one_by_one(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path, with_seeds("vit", "e-vit"))
    for run, top1 in (("vit-seed1", 98.2), ("vit-seed2", 98.9), ("e-vit-seed1", 95.8), ("e-vit-seed2", 96.9)):
        set_top1(tmp_path / "outputs" / run, top1)
    rows = cells(tmp_path, experiment)
    pooled, h_vit = rows["e-vit, 3 seeds"], rows["h-vit"]
    assert pooled["top-1 minus X's"].startswith("-2.30 (-") and pooled["McNemar's p"] == "–"
    assert (
        rows["e-vit-seed2"]["top-1 minus X's"].startswith("-2.00 (-") and rows["e-vit-seed2"]["McNemar's p"] == "<0.001"
    )
    assert h_vit["top-1 minus X's"].startswith("-0.27 (-") and h_vit["McNemar's p"] == "–", "one against three seeds"

    results = load_results(tmp_path, experiment)
    compared = {(c.label, c.baseline_label): c for c in run_results.compare_runs(list(results.values()))}
    assert list(compared) == [("e-vit", "vit"), ("h-vit", "vit"), ("e-resmlp", "resmlp"), ("e-convnext", "convnext")]
    found = compared["e-vit", "vit"]
    assert (found.num_seeds, found.num_baseline_seeds, found.verdict) == (3, 3, "worse")
    numbers = results["e-vit-seed2"].all_metrics()
    assert numbers["difference/to_x_pct"] == pytest.approx(-2.0) and numbers["difference/to_x_mcnemar_p"] < 1e-3
    assert (numbers["seeds/num"], numbers["seeds/top1_pct"]) == (3, pytest.approx(96.2667, abs=1e-4))
    assert numbers["seeds/top1_low_pct"] < 95.8 and numbers["seeds/top1_high_pct"] > 96.9
    assert numbers["seeds/to_x_pct"] == pytest.approx(-2.3) == found.difference_pct
    assert (numbers["seeds/to_x_low_pct"], numbers["seeds/to_x_high_pct"]) == found.interval
    assert "seeds/num" not in results["e-resmlp"].all_metrics()
    card = page.render_run_card(results["e-vit"], experiment)
    assert "| mean top-1 of its seeds | 96.3 % (95% interval" in card
    assert "| that mean minus the mean of X's seeds | -2.30 points (95% interval -" in card


def test_seeds_that_did_not_converge_are_not_compared(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path, with_seeds("e-vit"))
    for seed, top1 in ((1, 97.1), (2, 12.0)):
        set_top1(tmp_path / f"outputs/e-vit-seed{seed}", top1, converged=seed == 1)
    [found, *_] = run_results.compare_runs(list(load_results(tmp_path, experiment).values()))
    assert found.num_seeds == 2 and found.difference_pct == pytest.approx((96.1 + 97.1) / 2 - 98.6)


def test_a_tuned_recipe_is_compared_with_its_base_and_with_the_tuned_x(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = read_yaml(ROOT / "params.yaml")

    def params(*names: str) -> dict[str, Any]:
        return params_with_runs(*names) | {"sweeps": original["sweeps"]}

    monkeypatch.setattr(conftest, "params_with_runs", params)
    for run, args in (("vit", {"init_values": 0.2}), ("e-vit", {"head": "even+abs_odd"})):
        path = tmp_path / f"sweeps/recipe/{run}/best.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(dump_yaml({"recipe": {"lr": 1e-3}, "args": args}))
    experiment = write_fake_study(tmp_path, {run: original["models"][run] for run in ("vit-tuned", "e-vit-tuned")})
    for run, top1 in (("vit-tuned", 98.8), ("e-vit-tuned", 97.9)):
        set_top1(tmp_path / "outputs" / run, top1)
    results = load_results(tmp_path, experiment)
    pairs = [(c.label, c.baseline_label) for c in run_results.compare_runs(list(results.values()))]
    assert pairs[-3:] == [("vit-tuned", "vit"), ("e-vit-tuned", "vit-tuned"), ("e-vit-tuned", "e-vit")]
    sentences = "\n".join(table.summarize_runs(list(results.values())))
    assert (
        "vit-tuned: with the recipe that was tuned from vit's, top-1 98.8% against 98.6%: cannot be told" in sentences
    )
    assert "e-vit-tuned: with the recipe that was tuned from e-vit's, top-1 97.9% against 96.1%: better" in sentences
    numbers = results["e-vit-tuned"].all_metrics()
    assert numbers["difference/to_own_recipe_pct"] == pytest.approx(1.8)
    assert numbers["difference/to_x_pct"] == pytest.approx(-0.9)


def test_runs_on_different_images_are_refused(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path)
    write_hits(tmp_path / "outputs/e-vit", np.ones(NUM_IMAGES, bool), prefix="other")
    with pytest.raises(PairingError, match="e-vit and vit .* `dvc repro`"):
        load_results(tmp_path, experiment)


def test_outputs_without_predictions_are_shown_without_interval(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path)
    for folder in (tmp_path / "outputs").iterdir():
        (folder / "predictions.parquet").unlink()
        known = json.loads((folder / "metrics.json").read_text())
        conftest.write_json(
            folder / "metrics.json", **{k: v for k, v in known.items() if "_low" not in k and "_high" not in k}
        )
    results = list(load_results(tmp_path, experiment).values())
    rows = cells(tmp_path, experiment)
    assert rows["e-vit"]["top-1 %"] == "96.1" and "top-1 minus X's" not in rows["e-vit"]
    assert run_results.compare_runs(results) == []
    assert "top-1 96.1% against 98.6%." in table.summarize_runs(results)[0]
    _, written = page.write_report(experiment, results, tmp_path / "reports")
    assert "Wilson" not in written.read_text()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """The page of the digits' report, and of the same runs on data whose labels a flop does not change."""
    folder = tmp_path_factory.mktemp("reports")
    experiment = write_fake_study(folder)
    results = list(load_results(folder, experiment).values())
    pages = {}
    for invariant in (False, True):
        data = experiment.data.model_copy(update={"flop_invariant": invariant})
        changed = experiment.model_copy(update={"data": data})
        _, written = page.write_report(changed, results, folder / "reports")
        pages[invariant] = written.read_text()
    return pages


def test_the_report_says_where_e_is_expected_to_fall_behind(reports: dict[bool, str]) -> None:
    assert "expected to fall behind X here" in reports[False] and "wrong symmetry" not in reports[True]


def test_the_report_names_its_methods_and_shows_the_bounds(reports: dict[bool, str]) -> None:
    for words in ("Wilson", "percentile bootstrap of 10,000 draws", "McNemar", "scipy 1."):
        assert words in reports[True]
    assert "96.1<small>94.7–97.1</small>" in reports[True]


def test_what_a_flop_does_to_the_labels_is_no_part_of_a_training() -> None:
    experiment = config.load_experiment(ROOT / "params.yaml")
    assert experiment.data.flop_invariant is False
    assert "flop_invariant" not in experiment.resolved("vit")["data"]
