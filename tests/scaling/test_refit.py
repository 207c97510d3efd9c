"""`refit` writes the same files for the same runs, and sentences where there are too few of them."""

from __future__ import annotations

import html
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base.errors import ConfigError
from pipeline.base.files import write_json
from pipeline.reporting.page import render_template
from pipeline.reporting.scaling_section import ScalingSection, load_section
from pipeline.scaling.analysis import refit
from pipeline.scaling.findings import make_findings
from pipeline.scaling.fits import analyze
from pipeline.scaling.fits_file import to_json
from pipeline.scaling.runs import load_study
from tests.scaling.synthetic import Arm, Plan, X, write_study

FULL = Plan(
    arms={"x": Arm(X, averaged=0.98), "x-flop": Arm(X._replace(B=80.0), averaged=0.97), "e": Arm(X, flops=0.5)},
    fractions=(1, 0.25, 0.0625),
    seed_noise=0.01,
    image_noise=0.5,
    run_noise=0.2,
    fail=lambda row: (
        "diverged"
        if (row["arm"], row["size"], row["seed"]) == ("e", "w4", 0)
        else "failed"
        if (row["arm"], row["size"], row["unique_images"]) == ("x", "w2", 3750)
        else None
    ),
)

FIGURES = {"loss_vs_compute", "isoflop", "optimum", "images", "gap", "multiplier"}


def written(folder: Path, plan: Plan) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """Refits a study: fits, findings, names of the figures."""
    write_study(folder, plan)
    refit(folder)
    names = {path.stem.removeprefix("scaling_") for path in (folder / "figures").glob("*.png")}
    assert names == {path.stem.removeprefix("scaling_") for path in (folder / "figures").glob("*.csv")}
    fits, findings = (json.loads((folder / f"{name}.json").read_text()) for name in ("fits", "findings"))
    return fits, findings, names


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study with everything, refitted."""
    folder = tmp_path_factory.mktemp("full")
    write_study(folder, FULL)
    refit(folder)
    return folder


def test_a_whole_study(full):
    fits, findings = (json.loads((full / f"{name}.json").read_text()) for name in ("fits", "findings"))
    assert {path.stem.removeprefix("scaling_") for path in (full / "figures").iterdir()} == FIGURES
    assert findings["title"] == "Scaling study" and not findings["control"]
    assert fits["study"]["runs"]["e"] == {"finished": 40, "diverged": 4, "failed": 0}
    assert fits["study"]["runs"]["x"]["failed"] == 2
    assert "4 of 132 runs diverged and left out: e-w4-3e+11-60000-0 (it diverged)" in findings["left_out"][0]
    assert not any((c["series"], c["unique_images"]) == ("x", 3750) for c in fits["data_cells"])
    columns = findings["table"]["columns"]
    rows = {row[0]["text"]: dict(zip(columns, row, strict=True)) for row in findings["table"]["rows"]}
    assert list(rows) == ["x", "x-flop", "e", "x, averaged", "x-flop, averaged"]
    size, test = "best size, FLOPs an image", "FLOPs of a prediction"
    assert rows["x, averaged"][test]["sort"] == pytest.approx(2 * rows["x, averaged"][size]["sort"])
    assert rows["e"]["diverged, failed"]["text"] == "4, 0"


@pytest.fixture(scope="module")
def section(full: Path) -> ScalingSection:
    """The section of the report on it."""
    found = load_section(full)
    assert found is not None
    return found


def test_figures_count_what_is_left_out_and_draw_one_seed_hollow(section):
    figures = {figure.name: figure for figure in section.figures}
    for figure in figures.values():
        assert "4 diverged, 2 failed: left out" in figure.caption and len(figure.csv.splitlines()) > 1
    fan = figures["scaling_isoflop"].svg
    assert "e, w4, 300 GFLOPs" in fan and "(one seed)" in fan and "(2 seeds)" in fan


@pytest.mark.parametrize("template", ["report.html", "report.md"])
def test_the_report_has_paragraph_table_figures_and_reasons(section, template):
    text = html.unescape(render_section(template, replace(section, control="A control.")))
    assert "A control." in text and section.paragraph in text
    for sentence in (*section.notes, *section.table.footnotes, *(figure.caption for figure in section.figures)):
        assert sentence in text
    assert all(f"figures/{figure.name}.{kind}" in text for figure in section.figures for kind in ("csv", "png"))


def test_the_same_runs_give_the_same_files_to_the_last_digit(full, tmp_path):
    write_study(tmp_path, FULL)
    analysis = analyze(load_study(tmp_path))
    write_json(tmp_path / "fits.json", to_json(analysis))
    write_json(tmp_path / "findings.json", make_findings(analysis))
    for file in ("runs.csv", "losses.parquet", "fits.json", "findings.json"):
        assert (tmp_path / file).read_bytes() == (full / file).read_bytes()


@pytest.mark.slow
def test_300_runs_of_10000_images_take_less_than_a_minute(tmp_path):
    arms = {name: Arm(X._replace(B=90.0 - 3 * number)) for number, name in enumerate("xehmnw")}
    noise: Any = {"seed_noise": 0.01, "image_noise": 1.0, "run_noise": 0.3}
    budgets = np.geomspace(3e11, 3e13, 5)
    plan = Plan(arms=arms, budgets=budgets, num_images=10_000, settings={"bootstrap": 1000}, **noise)
    write_study(tmp_path, plan)
    start = time.process_time()
    refit(tmp_path)
    assert time.process_time() - start < 60
    assert (
        sum(row["finished"] for row in json.loads((tmp_path / "fits.json").read_text())["study"]["runs"].values())
        == 300
    )


def test_runs_that_did_not_finish_are_as_if_they_were_not_there(full):
    study = load_study(full)
    fits = to_json(analyze(replace(study, runs=tuple(run for run in study.runs if run.state == "finished"))))
    written = json.loads((full / "fits.json").read_text())
    assert {**json.loads(json.dumps(fits)), "study": None} == {**written, "study": None}


@pytest.mark.parametrize(
    ("plan", "sentence", "figures"),
    [
        (Plan(fail=lambda row: "failed"), "Nothing can be said: no run of x and e has finished.", set()),
        (
            Plan(sizes=(1e6,), budgets=(1e12,), seeds=1),
            "How much compute e and x need for the same loss is not known: 1 budget in common with x.",
            FIGURES - {"images", "multiplier"},
        ),
        (
            Plan(fail=lambda row: None if (row["arm"], row["size"]) == ("x", "w1") else "diverged"),
            "Nothing can be said: no run of e has finished.",
            {"loss_vs_compute", "isoflop", "optimum"},
        ),
        (
            Plan(num_images=1, seed_noise=0.01, sizes=(1e6, 3e6, 9e6), budgets=(1e12, 3e12)),
            "In short: ",
            FIGURES - {"images"},
        ),
        (
            Plan(arms={"x": Arm(X), "e": Arm(X._replace(A=5.0, B=5.0))}, sizes=(1e6, 3e6), budgets=(1e12, 3e12)),
            "At none of its budgets does x reach a loss that e has at any",
            FIGURES - {"images"},
        ),
    ],
    ids=["no run", "one run an arm", "no equivariant run", "one validation image", "no loss in common"],
)
def test_too_few_runs_are_sentences(tmp_path, plan, sentence, figures):
    fits, findings, names = written(tmp_path, plan)
    assert sentence in findings["paragraph"] and names == figures
    assert findings["not_identified"] and "nan" not in json.dumps([fits, findings]).lower().replace("finan", "")


def test_files_of_two_studies_are_refused(tmp_path):
    write_study(tmp_path, Plan())
    write_study(tmp_path / "other", Plan(arms={"x": Arm(X._replace(E0=0.3)), "e": Arm(X)}))
    (tmp_path / "losses.parquet").write_bytes((tmp_path / "other/losses.parquet").read_bytes())
    with pytest.raises(ConfigError, match="two studies"):
        refit(tmp_path)
    (tmp_path / "losses.parquet").unlink()
    with pytest.raises(ConfigError, match=r"losses\.parquet is missing"):
        refit(tmp_path)


def test_a_control_says_so(tmp_path):
    write_study(tmp_path, Plan(settings={"flop_invariant": False, "data": "digits"}))
    findings = make_findings(analyze(load_study(tmp_path)))
    assert findings["title"] == "Scaling study (a control)" and "the labels of digits change" in findings["control"]


def test_no_study_is_no_section(tmp_path):
    assert load_section(tmp_path) is None


def render_section(template: str, section: Any) -> str:
    """Renders a report that has nothing else."""
    from pipeline.reporting.table import Table

    nothing = {"lead": [], "paper_sizes": None, "links": {}, "runs": None, "summary": [], "notes": [], "sweeps": []}
    content = {"title": "flopeq", "lead_figure": section.figures[0], "table": Table((), (), (), 1), "figures": []}
    return render_template(template, **nothing, **content, scaling=section)
