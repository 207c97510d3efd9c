"""The table: columns, baselines, seeds and daggers."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

from pipeline.base.yaml_files import read_yaml
from pipeline.reporting import page, table
from tests.reporting.conftest import ROOT, TOP1, cells, diverge, load_results, set_top1, write_fake_study, write_json


def test_table_compares_each_run_with_its_baseline(tmp_path: Path) -> None:
    rows = cells(tmp_path, write_fake_study(tmp_path))
    assert list(rows) == ["vit", "e-vit", "h-vit", "resmlp", "e-resmlp", "convnext", "e-convnext"]
    e, x = rows["e-vit"], rows["vit"]
    assert (x["model"], e["model"], rows["h-vit"]["model"]) == ("ViT", "E(ViT)", "H(ViT)")
    assert (e["top-1 %"], e["flop agreement %"]) == ("96.1 (94.7–97.1)", "100.0")
    assert e["equivariance error"] == "3.1e-07"
    assert (x["MFLOPs"], e["MFLOPs"], e["MMACs"], e["params (k)"]) == ("2.20", "1.20", "1.08", "85.7")
    assert (e["throughput ratio"], e["FLOP ratio"], e["share %"]) == ("1.20 (1.20–1.23)", "1.83", "65")
    assert (x["throughput ratio"], x["FLOP ratio"], x["share %"]) == ("–", "–", "–")


def test_paper_columns_stand_only_beside_models_of_the_paper(tmp_path: Path) -> None:
    experiment = write_fake_study(
        tmp_path,
        {
            "vit": {"model": "deit3_small_patch16_224", "recipe": "digits"},
            "e-vit": {"model": "flop_deit3_small_patch16_224", "recipe": "digits"},
            "h-vit": {
                "model": "flophybrid_deit3_large_patch16_224",
                "args": {"num_flop_blocks": 3},
                "recipe": "digits",
            },
        },
    )
    small_images = cells(tmp_path, experiment)
    assert "top-1 %, ImageNet" not in small_images["vit"]

    data = experiment.data.model_copy(update={"image_size": 224})
    rows = cells(tmp_path, experiment.model_copy(update={"data": data}))
    assert (rows["vit"]["model"], rows["vit"]["top-1 %, ImageNet"]) == ("ViT-S", "80.4")
    assert (rows["vit"]["GFLOPs"], rows["vit"]["images/s, A100"]) == ("4.7", "7,174")
    assert rows["e-vit"]["top-1 %, ImageNet"] == "†"
    for name in ("h-vit", "resmlp", "e-convnext"):
        assert rows[name]["top-1 %, ImageNet"] == "–"
    assert rows["h-vit"]["model"] == "H(ViT)"


def test_ema_real_and_further_sets_have_columns_where_a_run_was_measured_so(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path)
    plain = cells(tmp_path, experiment)
    assert not [column for column in plain["vit"] if re.search("EMA|ReaL|v2", column)]

    path = tmp_path / "outputs/e-vit/metrics.json"
    more = {"val/ema_top1_pct": 96.4, "val/ema_top5_pct": 99.7, "val/real_top1_pct": 97.2,
            "v2/top1_pct": 84.3, "v2/top5_pct": 95.1}  # fmt: skip
    write_json(path, **json.loads(path.read_text()), **more)
    data = experiment.data.model_copy(update={"further_val": {"v2": Path("v2"), "unmeasured": Path("other")}})
    experiment = experiment.model_copy(update={"data": data})
    results = list(load_results(tmp_path, experiment).values())
    rows = cells(tmp_path, experiment)
    columns = ["EMA top-1 %", "EMA top-5 %", "ReaL top-1 %", "v2 top-1 %", "v2 top-5 %"]
    assert [rows["e-vit"][column] for column in columns] == ["96.4", "99.7", "97.2", "84.3", "95.1"]
    assert [rows["vit"][column] for column in columns] == ["–"] * 5
    assert rows["vit"].keys() - plain["vit"].keys() == set(columns)
    assert ("further validation", 2) in table.build_table(results).groups

    _, written = page.write_report(experiment, results, tmp_path / "reports")
    assert "Beyer et al. 2020" in written.read_text() and "v2 top‑1 %" in written.read_text()
    numbers = json.loads((tmp_path / "reports/metrics.json").read_text())
    assert more.items() <= numbers["e-vit"].items()


def test_runs_that_did_not_converge_get_a_dagger_and_a_footnote(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path)
    diverge(tmp_path / "outputs/e-vit")
    (tmp_path / "outputs/resmlp/metrics.json").unlink()
    for path in (tmp_path / "outputs/e-convnext").iterdir():
        path.unlink()
    results = list(load_results(tmp_path, experiment).values())
    compared, written = page.write_report(experiment, results, tmp_path / "reports")
    daggers = [row[0] for row in compared.texts if "†" in row[0]]
    assert daggers == ["e-vit †", "resmlp †", "e-convnext †"]
    assert "e-vit did not converge: it diverged" in compared.footnotes[0]
    assert len(compared.footnotes) == 3
    assert all(note in html.unescape(written.read_text()) for note in compared.footnotes)
    numbers = json.loads((tmp_path / "reports/metrics.json").read_text())
    assert numbers["e-vit"]["converged"] is False and numbers["vit"]["converged"] is True
    assert "equivariance/max_rel_error" not in numbers["e-vit"]


def test_seeds_are_one_row_with_their_spread_and_one_point(tmp_path: Path) -> None:
    models = read_yaml(ROOT / "params.yaml")["models"]
    experiment = write_fake_study(
        tmp_path, {f"{run}-seed{seed}": {**models[run], "seed": seed} for run in ("vit", "e-vit") for seed in (1, 2)}
    )
    for seed, top1 in ((1, 95.1), (2, 20.0)):
        set_top1(tmp_path / f"outputs/e-vit-seed{seed}", top1, converged=seed == 1)
    results = list(load_results(tmp_path, experiment).values())
    compared = table.build_table(results)
    rows = {row[0]: dict(zip(compared.columns, row, strict=True)) for row in compared.texts}
    assert list(rows)[:8] == [
        "vit, 3 seeds",
        "vit",
        "vit-seed1",
        "vit-seed2",
        "e-vit, 2 of 3 seeds",
        "e-vit",
        "e-vit-seed1",
        "e-vit-seed2 †",
    ]
    pooled = rows["e-vit, 2 of 3 seeds"]
    assert (pooled["top-5 %"], pooled["MFLOPs"], pooled["variant"]) == ("99.9", "1.20", "E")
    of_seeds = results[[r.run for r in results].index("e-vit")].pooled
    assert of_seeds
    interval = of_seeds.top1_interval
    assert pooled["top-1 %"] == f"95.6 ({interval.low:.1f}–{interval.high:.1f})"
    assert interval.low < 95.1 and interval.high > 96.1, "wider than the two seeds"
    assert [len(block) for block in compared.blocks] == [4, 4, 1, 1, 1, 1, 1]
    assert "e-vit, 2 of 3 seeds: 0.55 of the FLOPs of vit" in table.summarize_runs(results)[0]
    assert "top-1 95.6% against 97.5%: worse (-1.93 points, 95% interval -" in table.summarize_runs(results)[0]
    assert {result.baseline for result in results if result.group == "e-vit"} == {"vit", "vit-seed1", "vit-seed2"}


def test_runs_that_differ_in_more_than_their_seed_are_no_group(tmp_path: Path) -> None:
    vit = read_yaml(ROOT / "params.yaml")["models"]["vit"]
    wide = {**vit, "args": {**vit["args"], "embed_dim": 128}, "seed": 1}
    results = load_results(tmp_path, write_fake_study(tmp_path, {"vit-wide": wide, "vit-again": {**vit, "seed": 5}}))
    groups = {run: result.group for run, result in results.items()}
    assert (groups["vit-wide"], groups["vit-again"], groups["e-vit"]) == ("vit-wide", "vit", "e-vit")


def test_baseline_is_the_run_of_the_same_seed(tmp_path: Path) -> None:
    vit = read_yaml(ROOT / "params.yaml")["models"]["vit"]
    e_vit = {**vit, "model": "flop_deit3_small_patch16_224"}
    wide = {**vit, "args": {**vit["args"], "embed_dim": 128}}
    experiment = write_fake_study(
        tmp_path,
        {
            "vit": None,
            "wide-vit": wide,
            "vit-1": {**vit, "seed": 1},
            "vit-2": {**vit, "seed": 2},
            "e-vit": {**e_vit, "seed": 2},
            "h-vit": {**wide, "model": "flophybrid_deit3_large_patch16_224"},
        },
    )
    results = load_results(tmp_path, experiment)
    assert results["e-vit"].baseline == "vit-2"
    assert results["h-vit"].baseline is None, "another size"
    assert results["wide-vit"].baseline is None, "itself an X"


def test_throughputs_measured_differently_are_not_compared(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path)
    path = tmp_path / "reports/throughput.json"
    entries = json.loads(path.read_text())
    entries[0]["compiled"] = False
    path.write_text(json.dumps(entries))
    rows = cells(tmp_path, experiment)
    assert rows["e-vit"]["throughput ratio"] == "–" and rows["e-resmlp"]["throughput ratio"] == "1.20 (1.20–1.23)"


def test_a_failed_training_is_marked_and_shows_no_number_of_an_earlier_one(tmp_path):
    experiment = write_fake_study(tmp_path)
    (tmp_path / "outputs/e-vit/failed.json").write_text(json.dumps({"message": "out of memory"}))
    results = load_results(tmp_path, experiment)
    failed = results["e-vit"]
    assert failed.label == "e-vit †" and failed.top1_pct is None and failed.history == () and failed.hits is None
    assert results["vit"].top1_pct == TOP1["vit"]
    built = table.build_table(list(results.values()))
    assert "† e-vit did not converge: its training failed (out of memory)." in built.footnotes
