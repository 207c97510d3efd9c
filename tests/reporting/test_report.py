"""The report says what the files say, of good runs and of bad ones, and draws it without collisions."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

from flopeq.hub.export import export_model
from flopeq.models.build import build
from pipeline.base import config, schema
from pipeline.reporting import figures, page, revision_diff, run_results, sweep_sections, table
from stages import compare as compare_stage
from stages import report as report_stage
from tests.conftest import params_with_runs

ROOT = Path(__file__).resolve().parents[2]

NUM_EPOCHS = 12

FLOPS = {"X": 2.2e6, "H": 1.7e6, "E": 1.2e6}

SPEED = {"X": 20_000.0, "H": 22_000.0, "E": 24_000.0}

TOP1 = {
    "vit": 98.6,
    "h-vit": 98.3,
    "e-vit": 96.1,
    "resmlp": 97.8,
    "e-resmlp": 97.2,
    "convnext": 98.9,
    "e-convnext": 98.6,
}

FAMILY_SCALE = {"vit": 1.0, "resmlp": 0.8, "convnext": 1.4}


@pytest.fixture(autouse=True, scope="module")
def _in_temp_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No sweep that was run in the working directory gets into the reports made here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield


def write_fake_study(folder: Path, changes: dict[str, Any] | None = None) -> config.Experiment:
    """A folder as the stages before the report leave it, of the committed experiment with TOP1's accuracies.

    `changes` are merged into the `models` section; None there removes the run.
    """
    params = params_with_runs(*TOP1)
    params["models"] = {k: v for k, v in {**params["models"], **(changes or {})}.items() if v is not None}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    experiment = config.load_experiment(folder / "params.yaml")
    complexity, throughput = [], []
    for name, run in experiment.models.items():
        variant = "E" if "flop_" in run.model else "H" if "flophybrid_" in run.model else "X"
        scale = FAMILY_SCALE.get(name.split("-")[-1], 1.0)
        flops = int(FLOPS[variant] * scale)
        complexity.append(
            {
                "run": name,
                "model": run.model,
                "params": flops // 14,
                "flops": flops,
                "macs": int(flops * 0.9),
                "elementwise": int(flops * 0.1),
            }
        )
        throughput.append(
            {
                "run": name,
                "model": run.model,
                "device": "cpu",
                "dtype": "float32",
                "batch_size": 64,
                "img_per_s": SPEED[variant] / scale,
                "peak_mem_mb": None,
                "compiled": True,
            }
        )
        _run(folder / "outputs" / name, TOP1.get(name, 97.0), invariant=variant == "E")
    (folder / "reports").mkdir()
    (folder / "reports/complexity.json").write_text(json.dumps(complexity))
    (folder / "reports/throughput.json").write_text(json.dumps(throughput))
    return experiment


def _run(folder: Path, top1: float, invariant: bool) -> None:
    folder.mkdir(parents=True)
    rows = [_epoch(epoch, top1) for epoch in range(NUM_EPOCHS)]
    _history(folder, rows)
    _dump(folder / "run.json", run=folder.name, mlflow_run_id="0" * 32, fingerprint="f", status="finished")
    _dump(
        folder / "metrics.json",
        **{
            "val/top1_pct": top1,
            "val/top5_pct": 99.9,
            "val/loss": 0.1,
            "val/flop_agreement_pct": 100.0 if invariant else 41.5,
            "equivariance/max_rel_error": 3.1e-7 if invariant else 0.83,
            "converged": True,
        },
    )


def _epoch(epoch: int, top1: float) -> dict[str, float]:
    learnt = 1 - math.exp(-(epoch + 1) / 3)
    return {
        "epoch": epoch,
        "lr": 1e-3,
        "train/loss": 2.3 - 1.7 * learnt,
        "val/loss": 2.2 - 2 * learnt,
        "val/top1_pct": 10 + (top1 - 10) * learnt,
        "val/top5_pct": 99.0,
        "perf/img_per_s": 900.0,
    }


def _history(folder: Path, rows: list[dict[str, float]]) -> None:
    with (folder / "history.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _dump(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def diverge(folder: Path) -> None:
    """Makes of a run's folder one whose loss became non-finite in the third epoch."""
    _history(folder, [_epoch(0, 30.0), _epoch(1, 30.0)])
    _dump(
        folder / "run.json",
        run=folder.name,
        mlflow_run_id="0" * 32,
        fingerprint="f",
        status="diverged",
        message="loss nan in epoch 1 at step 5, lr 0.1; images of this worker's batch: ['train/3/7']",
    )
    _dump(
        folder / "metrics.json",
        **{
            "val/top1_pct": 19.7,
            "val/top5_pct": 66.0,
            "val/loss": None,
            "val/flop_agreement_pct": 100.0,
            "equivariance/max_rel_error": float("nan"),
            "converged": False,
        },
    )


def collect(folder: Path, experiment: config.Experiment) -> dict[str, run_results.RunResult]:
    return {r.run: r for r in run_results.load_results(experiment, folder / "outputs", folder / "reports")}


def cells(folder: Path, experiment: config.Experiment) -> dict[str, dict[str, str]]:
    compared = table.build_table(list(collect(folder, experiment).values()))
    return {row[0]: dict(zip(compared.columns, row, strict=True)) for row in compared.texts}


def test_table_compares_each_run_with_its_baseline(tmp_path: Path) -> None:
    rows = cells(tmp_path, write_fake_study(tmp_path))
    assert list(rows) == ["vit", "e-vit", "h-vit", "resmlp", "e-resmlp", "convnext", "e-convnext"]
    e, x = rows["e-vit"], rows["vit"]
    assert (x["model"], e["model"], rows["h-vit"]["model"]) == ("ViT", "E(ViT)", "H(ViT)")
    assert (e["top-1 %"], e["flop agreement %"], e["equivariance error"]) == ("96.1", "100.0", "3.1e-07")
    assert (x["MFLOPs"], e["MFLOPs"], e["MMACs"], e["params (k)"]) == ("2.20", "1.20", "1.08", "85.7")
    assert (e["throughput ratio"], e["FLOP ratio"], e["share %"]) == ("1.20", "1.83", "65")
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
    _dump(path, **json.loads(path.read_text()), **more)
    data = experiment.data.model_copy(update={"further_val": {"v2": Path("v2"), "unmeasured": Path("other")}})
    experiment = experiment.model_copy(update={"data": data})
    results = list(collect(tmp_path, experiment).values())
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
    results = list(collect(tmp_path, experiment).values())
    compared, written = page.write_report(experiment, results, tmp_path / "reports")
    daggers = [row[0] for row in compared.texts if "†" in row[0]]
    assert daggers == ["e-vit †", "resmlp †", "e-convnext †"]
    assert "e-vit did not converge: it diverged" in compared.footnotes[0]
    assert len(compared.footnotes) == 3
    assert all(note in html.unescape(written.read_text()) for note in compared.footnotes)
    numbers = json.loads((tmp_path / "reports/metrics.json").read_text())
    assert numbers["e-vit"]["converged"] is False and numbers["vit"]["converged"] is True
    assert "equivariance/max_rel_error" not in numbers["e-vit"]


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
    results = list(collect(folder, experiment).values())
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
    assert len(ids) == len(set(ids)) and content.count("<svg ") == 4
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', content)) <= set(ids)
    pngs = {path.stem for path in (written.reports / "figures").glob("*.png")}
    assert pngs == {"accuracy_vs_flops", "flops_vs_params", "throughput_gain", "training_curves"}
    assert (written.reports / "report.md").read_text().count("\n| ") == 2 + len(written.results)


def test_every_link_leads_somewhere_and_every_figure_has_its_data(written: Written) -> None:
    links = [html.unescape(link) for link in re.findall(r'<a href="([^"]+)"', written.content)]
    assert links.count(written.url) == len(written.results)
    files = [link for link in links if not link.startswith("http")]
    assert all((written.reports / file).resolve().is_file() for file in files)
    assert {"../outputs/vit/config.yaml", "../outputs/vit/weights.safetensors", "cards/e-vit.md"} <= set(files)
    assert "../outputs/e-vit/config.yaml" not in files
    for name in ("accuracy_vs_flops", "flops_vs_params", "throughput_gain", "training_curves"):
        assert {f"figures/{name}.csv", f"figures/{name}.png"} <= set(files)
    with (written.reports / "figures/accuracy_vs_flops.csv").open(newline="") as file:
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
    assert ("e-vit", "e-vit: MFLOPs per image 1.2; validation top-1 (%) 96.1") in marks


def test_names_that_look_like_markup_are_text(written: Written) -> None:
    assert "<b>digits" not in written.content and "&lt;b&gt;digits" in written.content


def test_seeds_are_one_row_with_their_spread_and_one_point(tmp_path: Path) -> None:
    models = yaml.safe_load((ROOT / "params.yaml").read_text())["models"]
    experiment = write_fake_study(
        tmp_path, {f"{run}-seed{seed}": {**models[run], "seed": seed} for run in ("vit", "e-vit") for seed in (1, 2)}
    )
    for seed, top1 in ((1, 95.1), (2, 20.0)):
        path = tmp_path / f"outputs/e-vit-seed{seed}/metrics.json"
        _dump(path, **{**json.loads(path.read_text()), "val/top1_pct": top1, "converged": seed == 1})
    results = list(collect(tmp_path, experiment).values())
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
    assert (pooled["top-1 %"], pooled["MFLOPs"], pooled["variant"]) == ("95.6 (95.1–96.1)", "1.20", "E")
    assert [len(block) for block in compared.blocks] == [4, 4, 1, 1, 1, 1, 1]
    assert "e-vit, 2 of 3 seeds: 0.55 of the FLOPs of vit" in table.summarize_runs(results)[0]
    assert "top-1 95.6% (95.1–96.1) against 97.5% (97.0–98.6)" in table.summarize_runs(results)[0]
    assert {result.baseline for result in results if result.group == "e-vit"} == {"vit", "vit-seed1", "vit-seed2"}

    drawn = {picture.name: picture for picture in figures.draw_figures(results, (1e6, "MFLOPs"), (1e3, "k"))}
    accuracy = drawn["accuracy_vs_flops"]
    assert accuracy.svg.count('class="mark"') == len(TOP1) and "several seeds" in accuracy.caption
    assert "95.6 (95.1 to 96.1, 2 seeds)" in accuracy.svg
    assert len(accuracy.csv.splitlines()) == 1 + len(results)


def test_runs_that_differ_in_more_than_their_seed_are_no_group(tmp_path: Path) -> None:
    vit = yaml.safe_load((ROOT / "params.yaml").read_text())["models"]["vit"]
    wide = {**vit, "args": {**vit["args"], "embed_dim": 128}, "seed": 1}
    results = collect(tmp_path, write_fake_study(tmp_path, {"vit-wide": wide, "vit-again": {**vit, "seed": 5}}))
    groups = {run: result.group for run, result in results.items()}
    assert (groups["vit-wide"], groups["vit-again"], groups["e-vit"]) == ("vit-wide", "vit", "e-vit")


def test_sweeps_have_tables_that_sort_by_number_and_figures_with_data(tmp_path: Path) -> None:
    trial = {"top1_pct": 90.0, "params": {"lr": 1e-3}, "is_own": False}
    found = {
        "vit": {
            "own": trial,
            "best": {**trial, "top1_pct": 91.0},
            "states": {"finished": 2},
            "confirmed": {"seeds": [], "start": [], "best": []},
            "importance": {"lr": 1.0},
            "log_fields": ["lr"],
            "beyond_spread": False,
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
    _dump(tmp_path / "recipe/findings.json", **found)
    _dump(tmp_path / "hybrid/findings.json", splits=[split], runs={})
    with (tmp_path / "recipe/trials.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "run", "state", "top1_pct", "confirms", "lr"])
        writer.writerows([["vit-0", "vit", "finished", 90.0, 0, 1e-3], ["vit-1", "vit", "stopped", 91.0, 0, 2e-3]])

    recipe, hybrid = sweep_sections.load_sections(tmp_path)
    pictures = {picture.name: picture for section in (recipe, hybrid) for picture in section.figures}
    assert list(pictures) == ["sweep_history", "sweep_importance", "sweep_parallel", "sweep_pareto"]
    assert all(len(picture.csv.splitlines()) > 1 for picture in pictures.values())
    assert "<title>vit-1, stopped: top-1 91.0%</title>" in pictures["sweep_history"].svg
    assert "<title>h-vit, k = 1: 2 MFLOPs, top-1 90.0% (89.0 to 91.0, 2 seeds)</title>" in pictures["sweep_pareto"].svg
    cells = dict(zip(hybrid.table.columns, hybrid.table.rows[0].cells, strict=True))
    assert (cells["params"].text, cells["params"].sort_key) == ("12,345", 12_345.0)
    assert (cells["top-1, mean"].sort_key, cells["Pareto front"].sort_key) == (90.0, "yes")


def test_card_says_what_the_model_is_and_does(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path)
    diverge(tmp_path / "outputs/h-vit")
    results = collect(tmp_path, experiment)
    _, header, text = page.render_run_card(results["e-vit"], experiment).split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "timm", "pipeline_tag": "image-classification", "license": "apache-2.0",
        "tags": ["image-classification", "timm", "equivariance", "flopeq"], "datasets": ["digits"],
    }  # fmt: skip
    assert "`flop_deit3_small_patch16_224`" in text and "embed_dim=64" in text and "| top-1 | 96.1 % |" in text
    assert "equivariant to horizontal mirroring" in text and "| 3.1e-07 |" in text
    assert "| images/s forward (cpu, float32, batch 64, compiled) | 24,000 |" in text
    assert "over these | 1.83 |" in text and "| images/s over those of X | 1.20 |" in text
    assert "float64" not in text and f"MLflow {'0' * 32}, configuration f." in text
    assert "$ flopeq export --run outputs/e-vit exported/e-vit\n" in text and '"local-dir:exported/e-vit"' in text
    assert "| lr | 0.002 |" in text and "Workers: 1, of 1 CPU core each" in text and "## Intended use" in text
    assert "did not converge" not in text
    failed = page.render_run_card(results["h-vit"], experiment)
    assert "**It did not converge: it diverged (loss nan in epoch 1 at step 5, lr 0.1)" in failed
    assert "A hybrid" in failed
    assert "| equivariance error of" not in failed and "| loss | ce |" in failed and failed.count("| loss |") == 1
    unmeasured = run_results.load_results(experiment, tmp_path / "nowhere", tmp_path / "nowhere")[0]
    bare = page.render_run_card(unmeasured, experiment)
    assert "no validation accuracy" in bare and "Not evaluated." in bare
    assert "| parameters |" not in bare and "images/s" not in bare and "MLflow" not in bare


def test_an_exported_folder_and_the_report_say_the_same_of_a_run(tmp_path: Path) -> None:
    experiment = write_fake_study(tmp_path)
    folder = tmp_path / "outputs/e-vit"
    told = experiment.resolved("e-vit")
    (folder / "config.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    save_file(build(told["model"], num_classes=10, **told["args"]).state_dict(), folder / "weights.safetensors")
    export_model(None, tmp_path / "exported", run=folder)
    exported = (tmp_path / "exported/README.md").read_text()
    reported = page.render_run_card(collect(tmp_path, experiment)["e-vit"], experiment)
    for start, end in (("---\n", "\n# "), ("## Training", "## Use"), ("## Intended use", "```bibtex")):
        part = reported[reported.index(start) : reported.index(end)]
        assert len(part) > 50 and exported[exported.index(start) : exported.index(end)] == part


@pytest.fixture
def revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with DVC and git: a revision without metrics, one with them, and other metrics in the workspace."""
    monkeypatch.chdir(tmp_path)
    for key in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{key}_NAME", "t")
        monkeypatch.setenv(f"GIT_{key}_EMAIL", "t@t")

    def git(*command: str) -> None:
        subprocess.run(["git", *command], check=True, capture_output=True)

    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").touch()
    git("init")
    Path("params.yaml").write_text(yaml.safe_dump({"train": {"workers": 1, "amp": "off"}, "seed": 0}))
    git("add", ".")
    git("commit", "-m", "nothing measured")
    Path("reports").mkdir()
    _dump(Path("reports/metrics.json"), vit={"val/top1_pct": 98.0, "perf/share": 0.5}, gone={"val/top1_pct": 90.0})
    git("add", ".")
    git("commit", "-m", "measured")
    Path("params.yaml").write_text(yaml.safe_dump({"train": {"workers": 2, "amp": "off"}, "seed": 0, "new": {"a": 1}}))
    _dump(Path("reports/metrics.json"), vit={"val/top1_pct": 98.5, "perf/share": 0.5}, more={"val/top1_pct": 97.0})
    return tmp_path


def test_comparison_shows_what_differs_between_revisions(revisions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    then, now = revision_diff.load_revision("HEAD"), revision_diff.load_revision(None)
    found = [(d.run, d.name, d.before, d.after) for d in revision_diff.find_differences(then, now)]
    assert found == [
        ("", "train.workers", 1, 2),
        ("", "new", None, {"a": 1}),
        ("vit", "val/top1_pct", 98.0, 98.5),
        ("more", "the run", None, {"val/top1_pct": 97.0}),
        ("gone", "the run", {"val/top1_pct": 90.0}, None),
    ]
    compared = revision_diff.build_comparison_table(then, now)
    assert compared.columns == ("run", "HEAD", "now", "change")
    assert compared.texts == [["vit", "98.0", "98.5", "+0.5"], ["more", "–", "97.0", "–"], ["gone", "90.0", "–", "–"]]
    compare_stage.run("HEAD")
    written = Path("reports/comparison.html").read_text()
    assert "Settings that differ" in written and "train.workers" in written and "+0.5" in written
    assert "val/top1_pct" in capsys.readouterr().out
    compare_stage.run(".", ".")
    assert "Nothing differs" in Path("reports/comparison.html").read_text()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("nonsense", "'nonsense' is neither a revision"),
        ("HEAD~1", "HEAD~1 has no reports/metrics.json: commit dvc.lock"),
        (".dvc", "make repro"),
    ],
)
def test_comparison_says_what_it_misses(revisions: Path, where: str, words: str) -> None:
    with pytest.raises(revision_diff.CompareError, match=re.escape(words)):
        revision_diff.load_revision(where)


def test_baseline_is_the_run_of_the_same_seed(tmp_path: Path) -> None:
    vit = yaml.safe_load((ROOT / "params.yaml").read_text())["models"]["vit"]
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
    results = collect(tmp_path, experiment)
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
    assert rows["e-vit"]["throughput ratio"] == "–" and rows["e-resmlp"]["throughput ratio"] == "1.20"


@pytest.mark.parametrize("spread", [0.0, 0.2, 5.0])
def test_labels_stay_clear_of_each_other(tmp_path: Path, spread: float) -> None:
    results = list(collect(tmp_path, write_fake_study(tmp_path)).values())
    places = {result.run: 90 + spread * number for number, result in enumerate(results)}
    figure = figures.scatter(results, lambda r: (r.flops or 0) / 1e6, lambda r: places[r.run], "x", "y")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(results)
    assert not any(a.overlaps(b) for number, a in enumerate(boxes) for b in boxes[:number])


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
