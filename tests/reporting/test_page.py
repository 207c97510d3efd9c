"""The report says what the files say, of good runs and of bad ones, and draws it without collisions."""

from __future__ import annotations

import csv
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.base import config, schema
from pipeline.reporting import page, run_results
from stages import report as report_stage
from tests.reporting.conftest import ROOT, TOP1, load_results, write_fake_study


def test_nothing_measured_is_a_report_too(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path)
    results = run_results.load_results(experiment, tmp_path / "nowhere", tmp_path / "nowhere")
    compared, written = page.write_report(experiment, results, tmp_path / "reports")
    assert written.is_file() and all("†" in row[0] for row in compared.texts)


@dataclass(frozen=True)
class Written:
    """A report of seven runs in an experiment with a bold name, of which one has its files and all their MLflow run."""

    folder: Path
    experiment: config.Experiment
    results: list[run_results.RunResult]
    content: str
    url: str = "http://127.0.0.1:5000/#/a?b&c"

    @property
    def reports(self) -> Path:
        return self.folder / "reports"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("written")
    experiment = write_fake_study(folder).model_copy(update={"tracking": schema.Tracking(experiment="<b>digits</b>")})
    for file in ("config.yaml", "weights.safetensors"):
        (folder / "outputs/vit" / file).touch()
    results = list(load_results(folder, experiment).values())
    return Written(folder, experiment, results, _write(folder, experiment, results))


def _write(folder: Path, experiment: config.Experiment, results: list[run_results.RunResult]) -> str:
    _, path = page.write_report(
        experiment, results, folder / "reports", outputs=folder / "outputs", run_urls={"0" * 32: Written.url}
    )
    return path.read_text()


def test_page_is_self_contained_and_the_same_for_the_same_numbers(written: Written) -> None:
    content = written.content
    assert content == _write(written.folder, written.experiment, written.results)
    assert not re.search(r"\bsrc=|@import|url\((?!#)|<link", content)
    ids = re.findall(r'\bid="([^"]*)"', content)
    assert len(ids) == len(set(ids)) and content.count("<svg ") == 5, "the lead has two panels"
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', content)) <= set(ids)
    pngs = {path.stem for path in (written.reports / "figures").glob("*.png")}
    assert pngs == {"accuracy_vs_cost", "flops_vs_params", "throughput_gain", "training_curves"}
    assert (written.reports / "report.md").read_text().count("\n| ") == 2 + len(written.results)


def test_every_link_leads_somewhere_and_every_figure_has_its_data(written: Written) -> None:
    links = [html.unescape(link) for link in re.findall(r'<a href="([^"]+)"', written.content)]
    assert links.count(written.url) == len(written.results)
    files = [link for link in links if not link.startswith("http")]
    assert all((written.reports / file).resolve().is_file() for file in files)
    assert {"../outputs/vit/config.yaml", "../outputs/vit/weights.safetensors", "cards/e-vit.md"} <= set(files)
    assert "../outputs/e-vit/config.yaml" not in files
    for name in ("accuracy_vs_cost", "flops_vs_params", "throughput_gain", "training_curves"):
        assert {f"figures/{name}.csv", f"figures/{name}.png"} <= set(files)
    with (written.reports / "figures/accuracy_vs_cost.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert {run: float(row["val/top1_pct"]) for run, row in rows.items()} == TOP1
    assert float(rows["e-vit"]["complexity/gflops"]) == 0.0012


def test_table_can_be_sorted_and_marks_say_what_they_are_without_a_script(written: Written) -> None:
    content = written.content
    script = (ROOT / "pipeline/reporting/templates/page.js").read_text().strip()
    assert script in content and '<table class="sortable">' in content
    assert '<th scope="row" class="word" data-order="vit">vit</th>' in content
    assert re.search(r'data-order="98\.6">98\.6<', content)
    marks = re.findall(r'<g class="mark" data-run="([^"]+)"><title>([^<]+)</title>', content)
    assert {run for run, _ in marks} == set(TOP1)
    assert ("e-vit", "e-vit: MFLOPs per image 1.2; validation top-1 (%) 96.1 (94.71 to 97.13)") in marks
    assert (
        "vit",
        "vit: µs per image, measured 50 (47.73 to 52.78); validation top-1 (%) 98.6 (97.66 to 99.16)",
    ) in marks


def test_names_that_look_like_markup_are_text(written: Written) -> None:
    assert "<b>digits" not in written.content and "&lt;b&gt;digits" in written.content


def test_stage_prints_the_table_and_where_the_page_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fake_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    report_stage.run()
    assert capsys.readouterr().out == ""
    report_stage.print_report()
    printed = capsys.readouterr().out.rstrip()
    assert printed.endswith(str(tmp_path / "reports/index.html"))
    lines = printed.splitlines()[:-1]
    assert max(map(len, lines)) <= 80 and sum("e-convnext" in line for line in lines) > 1
    assert all(word in printed for word in ("E(ConvNeXt (iso.))", "24,000", "3.1e-07", "98.6"))


@pytest.mark.parametrize(
    ("asked", "compiled", "said"),
    [
        (True, {}, "compiled"),
        (True, {"vit": False}, "compiled, except vit, whose machine lacked a compiler"),
        (True, {"vit": False, "e-vit": False}, "eager"),
        (False, {"vit": False, "e-vit": False}, "eager"),
    ],
)
def test_a_training_that_could_not_compile_is_not_called_compiled(asked, compiled, said, tmp_path) -> None:
    experiment = write_fake_study(tmp_path, {name: None for name in TOP1 if name not in ("vit", "e-vit")})
    experiment = experiment.model_copy(update={"train": experiment.train.model_copy(update={"compile": asked})})
    for name, is_compiled in compiled.items():
        path = tmp_path / "outputs" / name / "run.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "compiled": is_compiled}))
    notes = page.measurement_notes(experiment, list(load_results(tmp_path, experiment).values()))
    assert f"mixed precision off, {said}; the weights" in notes[0]


def test_the_report_says_which_trainings_were_bound_by_their_input(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path)
    for name, waits in (("vit", (8.0, 9.0)), ("e-vit", (10.0, 50.0))):
        path = tmp_path / "outputs" / name / "history.csv"
        rows = list(csv.DictReader(path.read_text().splitlines()))[:2]
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, [*rows[0], "perf/data_wait_pct"])
            table.writeheader()
            table.writerows(row | {"perf/data_wait_pct": wait} for row, wait in zip(rows, waits, strict=True))
    results = load_results(tmp_path, experiment)
    assert results["vit"].data_wait_pct == 8.5 and results["h-vit"].data_wait_pct is None
    assert results["e-vit"].all_metrics()["perf/data_wait_pct"] == 30
    [note] = [note for note in page.measurement_notes(experiment, list(results.values())) if "Bound by" in note]
    assert "(e-vit 30%)" in note and "not" not in note.partition("(")[0]
    assert not [note for note in page.measurement_notes(experiment, [results["vit"]]) if "Bound by" in note]
