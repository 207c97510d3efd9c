"""The report's sections on sweeps."""

from __future__ import annotations

import csv
from pathlib import Path

from pipeline.reporting import sweep_sections
from tests.reporting.conftest import write_json


def test_sweeps_have_tables_that_sort_by_number_and_figures_with_data(tmp_path: Path) -> None:
    trial = {"top1_pct": 90.0, "params": {"lr": 1e-3}, "is_own": False}
    findings = {
        "vit": {
            "own": trial,
            "best": {**trial, "top1_pct": 91.0},
            "states": {"finished": 2},
            "search_epochs": 8,
            "full_epochs": 60,
            "confirmed": {"seeds": [1], "own": [97.0], "best": [96.0]},
            "is_confirmed": False,
            "ranking": {
                "configurations": [
                    {"trial": "vit-0", "is_own": True, "search_top1_pct": 90.0, "full_top1_pct": 97.0},
                    {"trial": "vit-1", "is_own": False, "search_top1_pct": 91.0, "full_top1_pct": 96.0},
                ],
                "coefficient": -1.0,
                "p_value": 1.0,
            },
            "importance": {"lr": 1.0},
            "log_fields": ["lr"],
        }
    }
    split = {
        "run": "h-vit",
        "k": 1,
        "top1_pct": 90.0,
        "top1": [89.0, 91.0],
        "params": 12_345,
        "flops": 2_000_000,
        "flop_fraction": 0.7,
        "img_per_s": 1234.5,
        "on_front": True,
    }
    for folder in ("recipe", "hybrid"):
        (tmp_path / folder).mkdir()
    write_json(tmp_path / "recipe/findings.json", **findings)
    write_json(tmp_path / "hybrid/findings.json", splits=[split], runs={})
    with (tmp_path / "recipe/trials.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "run", "state", "top1_pct", "confirms", "lr"])
        writer.writerows([["vit-0", "vit", "finished", 90.0, 0, 1e-3], ["vit-1", "vit", "stopped", 91.0, 0, 2e-3]])

    recipe, hybrid = sweep_sections.load_sections(tmp_path)
    pictures = {picture.name: picture for section in (recipe, hybrid) for picture in section.figures}
    assert list(pictures) == ["sweep_history", "sweep_ranking", "sweep_importance", "sweep_parallel", "sweep_pareto"]
    assert all(len(picture.csv.splitlines()) > 1 for picture in pictures.values())
    title = "<title>vit-1: top-1 91.0% in the search, 96.0% at full length</title>"
    assert title in pictures["sweep_ranking"].svg and "Spearman" not in pictures["sweep_ranking"].svg
    assert [[cell.text for cell in row.cells[:4]] for row in recipe.table.rows] == [
        ["vit, own recipe", "90.0%", "97.0%", "yes"],
        ["vit, best of the search", "91.0%", "96.0%", "no"],
    ]
    assert "vit: " in recipe.sentences[0] and "keeps its own recipe" in recipe.sentences[0]
    assert "<title>vit-1, stopped: top-1 91.0%</title>" in pictures["sweep_history"].svg
    assert "<title>h-vit, k = 1: 2 MFLOPs, top-1 90.0% (89.0 to 91.0, 2 seeds)</title>" in pictures["sweep_pareto"].svg
    cells = dict(zip(hybrid.table.columns, hybrid.table.rows[0].cells, strict=True))
    assert (cells["params"].text, cells["params"].sort_key) == ("12,345", 12_345.0)
    assert (cells["top-1, mean"].sort_key, cells["Pareto front"].sort_key) == (90.0, "yes")
