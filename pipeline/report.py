"""The report: what every run of the experiment reached, cost and gained, as a page, figures and numbers.

Everything comes from files: outputs/<run>/ and the measurements in reports/. A run without some of them, or
one that did not converge, has its row all the same, with a dagger.
"""

from __future__ import annotations

import base64
import csv
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from flopeq.paper import Table1Row, table1
from flopeq.registry import describe
from pipeline import figures, findings
from pipeline.config import Experiment

_MEASURED = (
    "val/top1_pct",
    "val/top5_pct",
    "val/loss",
    "val/flop_agreement_pct",
    "equivariance/max_rel_error",
    "val/ema_top1_pct",
    "val/ema_top5_pct",
    "val/real_top1_pct",
)
_FURTHER = {"top1_pct": "top-1 %", "top5_pct": "top-5 %"}
"""Metrics of a further validation set."""
_PAPER_IMAGE_SIZE = 224
_SHAPELESS = ("num_flop_blocks", "head", "init_values", "ls_init_value")
"""Arguments in which X and its E may differ."""


@dataclass(frozen=True)
class Result:
    """What is known of one run; None: not measured, or not defined for it."""

    run: str
    model: str
    name: str
    """The paper's name, without the size where width, depth or resolution are not the paper's."""
    family: str | None
    variant: str | None
    paper: Table1Row | None
    """The paper's row, for the paper's model at the paper's resolution."""
    failure: str | None
    """Why the run has a dagger."""
    history: tuple[Mapping[str, float], ...]
    """A row per epoch, with history.csv's columns."""
    measured: Mapping[str, float]
    """What of metrics.json is a number."""
    params: int | None
    flops: int | None
    """In the paper's convention, per image."""
    macs: int | None
    speed: Mapping[str, Any]
    """The run's entry in throughput.json."""
    baseline: str | None
    """For E and H: the run of X of the same size and arguments; of several, nearest in recipe and seed."""
    throughput_ratio: float | None = None
    """Images per second over the baseline's."""
    flop_ratio: float | None = None
    """The baseline's FLOPs over this run's."""

    @property
    def converged(self) -> bool:
        return self.failure is None

    @property
    def label(self) -> str:
        """The run's name, with a dagger if it did not converge."""
        return self.run if self.converged else f"{self.run} †"

    @property
    def top1_pct(self) -> float | None:
        return self.measured.get("val/top1_pct")

    @property
    def img_per_s(self) -> float | None:
        return self.speed.get("img_per_s")

    @property
    def share(self) -> float | None:
        """How much of the saved FLOPs arrives as speed: the throughput ratio over the FLOP ratio."""
        if self.throughput_ratio is None or self.flop_ratio is None:
            return None
        return self.throughput_ratio / self.flop_ratio

    def numbers(self) -> dict[str, float | bool]:
        """All numbers under their names in metrics.json and MLflow."""
        numbers = {
            "converged": self.converged,
            **self.measured,
            "complexity/params_m": self.params and self.params / 1e6,
            "complexity/gflops": self.flops and self.flops / 1e9,
            "complexity/gmacs": self.macs and self.macs / 1e9,
            "perf/forward_img_per_s": self.img_per_s,
            "perf/peak_mem_mb": self.speed.get("peak_mem_mb"),
            "perf/throughput_ratio": self.throughput_ratio,
            "complexity/flop_ratio": self.flop_ratio,
            "perf/share": self.share,
        }
        return {key: value for key, value in numbers.items() if value is not None}


@dataclass(frozen=True)
class Table:
    """The comparison, ready to print: every cell is text, `–` where there is nothing to say."""

    groups: tuple[tuple[str, int], ...]
    """Headings above the columns' and how many columns each spans."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text_columns: int
    """The first columns hold words, the others numbers."""
    footnotes: tuple[str, ...]


def collect(
    experiment: Experiment, outputs: Path = Path("outputs"), reports: Path = Path("reports")
) -> list[Result]:
    """The results of every run in params.yaml, in its order."""
    complexity = {entry["run"]: entry for entry in _json(reports / "complexity.json", [])}
    throughput = {entry["run"]: entry for entry in _json(reports / "throughput.json", [])}
    results = {
        name: _read(experiment, name, outputs / name, complexity.get(name, {}), throughput.get(name, {}))
        for name in experiment.models
    }
    return [_compare(result, results.get(result.baseline or "")) for result in results.values()]


def write(
    experiment: Experiment, results: Sequence[Result], reports: Path = Path("reports"), sweeps: Path = Path("sweeps")
) -> tuple[Table, Path]:
    """Writes page, Markdown, figures and numbers into `reports`. Returns the table and the page's path."""
    table = tabulate(results)
    pictures = figures.draw(results, _flop_unit(results), _param_unit(results))
    content = {
        "title": f"flopeq: {experiment.tracking.experiment}",
        "table": table,
        "summary": summarize(results),
        "notes": measured_how(experiment, results),
        "pictures": pictures,
        "sweeps": (sections := findings.sections(sweeps)),
    }
    reports.mkdir(parents=True, exist_ok=True)
    for picture in (*pictures, *(picture for section in sections for picture in section.pictures)):
        (reports / f"{picture.name}.png").write_bytes(picture.png)
    page = reports / "index.html"
    page.write_text(_render("report.html", autoescape=True, **content), encoding="utf-8")
    (reports / "report.md").write_text(_render("report.md", autoescape=False, **content), encoding="utf-8")
    numbers = {result.run: result.numbers() for result in results}
    (reports / "metrics.json").write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    return table, page


def tabulate(results: Sequence[Result]) -> Table:
    """The comparison table; the paper's columns are there if a run is a model of the paper."""
    (per_flop, flop_unit), (per_param, param_unit) = _flop_unit(results), _param_unit(results)
    mac_unit = flop_unit.replace("FLOPs", "MACs")

    def percent(key: str) -> Callable[[Result], str]:
        return lambda r: _fixed(r.measured.get(key), 1)

    groups: dict[str, dict[str, Callable[[Result], str]]] = {
        "": {
            "run": lambda r: r.label,
            "model": lambda r: r.name,
            "variant": lambda r: r.variant or "–",
        },
        "cost per image": {
            f"params ({param_unit})": lambda r: _figures(r.params, per_param),
            flop_unit: lambda r: _figures(r.flops, per_flop),
            mac_unit: lambda r: _figures(r.macs, per_flop),
        },
        "validation": {
            "top-1 %": percent("val/top1_pct"),
            "top-5 %": percent("val/top5_pct"),
            **{
                column: percent(key)
                for key, column in {
                    "val/ema_top1_pct": "EMA top-1 %",
                    "val/ema_top5_pct": "EMA top-5 %",
                    "val/real_top1_pct": "ReaL top-1 %",
                }.items()
                if _any_has(results, key)
            },
            "flop agreement %": percent("val/flop_agreement_pct"),
            "equivariance error": lambda r: _error(r.measured.get("equivariance/max_rel_error")),
        },
        "speed": {
            "images/s": lambda r: _fixed(r.img_per_s, 0),
            "throughput ratio": lambda r: _fixed(r.throughput_ratio, 2),
            "FLOP ratio": lambda r: _fixed(r.flop_ratio, 2),
            "share %": lambda r: _fixed(r.share and 100 * r.share, 0),
        },
    }
    if further := _further(results):
        groups["further validation"] = {
            f"{name} {column}": percent(f"{name}/{key}") for name in further for key, column in _FURTHER.items()
        }
    if any(result.paper for result in results):
        groups["the paper's"] = {
            "params (M)": lambda r: _fixed(r.paper and r.paper.params_m, 1),
            "GFLOPs": lambda r: _fixed(r.paper and r.paper.gflops_per_img, 1),
            "top-1 %, ImageNet": lambda r: _paper_top1(r.paper),
            "images/s, A100": lambda r: _fixed(r.paper and r.paper.throughput_a100_im_s, 0),
        }
    columns = [(name, cell) for group in groups.values() for name, cell in group.items()]
    return Table(
        groups=tuple((name, len(group)) for name, group in groups.items()),
        columns=tuple(name for name, _ in columns),
        rows=tuple(tuple(cell(result) for _, cell in columns) for result in results),
        num_text_columns=3,
        footnotes=tuple(f"† {r.run} did not converge: {r.failure}." for r in results if r.failure),
    )


def summarize(results: Sequence[Result]) -> list[str]:
    """A sentence for each E and H that has its X beside it."""
    base, sentences = {result.run: result for result in results}, []
    for result in results:
        if not result.baseline or not result.flop_ratio:
            continue
        said = [f"{1 / result.flop_ratio:.2f} of the FLOPs of {result.baseline}"]
        if result.throughput_ratio:
            said.append(f"{result.throughput_ratio:.2f} times its throughput")
        ours, theirs = result.top1_pct, base[result.baseline].top1_pct
        if ours is not None and theirs is not None:
            said.append(f"top-1 {ours:.1f}% against {theirs:.1f}%")
        sentences.append(f"{result.label}: {', '.join(said)}.")
    return sentences


def measured_how(experiment: Experiment, results: Sequence[Result]) -> list[str]:
    """Where the numbers come from and under what conditions they hold."""
    train, data = experiment.train, experiment.data
    settings = {
        f"{s['device']}, {s['dtype']}, batch {s['batch_size']}, {'compiled' if s['compiled'] else 'eager'}"
        for s in (result.speed for result in results)
        if s
    }
    workers = f"{train.most_workers} worker{'s' if train.most_workers > 1 else ''}"
    notes = [
        f"Data: {data.name}, images of {data.image_size} × {data.image_size} pixels. Training: {workers} of "
        f"{train.cpus_per_worker} CPU cores, mixed precision {train.amp}, "
        f"{'compiled' if train.compile else 'eager'}; the weights are of the epoch with the best top-1.",
        "FLOPs: one image's forward pass in the paper's convention, in which a multiply-add counts 1 and "
        "element-wise operations count too; MACs are the multiply-adds alone.",
        "Flop agreement: validation images whose mirror image gets the same top-1 class. Equivariance error: "
        "the largest relative change of the logits under mirroring.",
        f"Throughput: forward passes without gradients, {'; '.join(sorted(settings)) or 'not measured'}; the "
        f"median of {experiment.throughput.runs} passes after {experiment.throughput.warmup} to warm up, all "
        "models taking turns.",
        "Throughput ratio: E or H over X. FLOP ratio: X over E or H. Share: the first over the second, the "
        "part of the saved work that arrives as speed.",
        f"Versions: {', '.join(f'{name} {version(name)}' for name in ('torch', 'timm'))}.",
    ]
    if _any_has(results, "val/ema_top1_pct"):
        notes.append("EMA: the moving average of the weights, at its own best epoch; all else is of the plain weights.")
    if _any_has(results, "val/real_top1_pct"):
        notes.append("ReaL: ImageNet's reassessed labels (Beyer et al. 2020), of which an image may have several.")
    if further := _further(results):
        notes.append(f"Further validation, never trained or chosen on: {', '.join(further)}.")
    if any(result.paper for result in results):
        notes.append(
            "The paper's columns (Bökman et al. 2025, Table 1): ImageNet-1K; one A100-40GB, batch 64, "
            "compiled, mixed precision."
        )
    return notes


def _read(
    experiment: Experiment, name: str, folder: Path, complexity: Mapping[str, Any], speed: Mapping[str, Any]
) -> Result:
    run = experiment.run(name)
    info = describe(run.model)
    papers = not run.args and experiment.data.image_size == _PAPER_IMAGE_SIZE
    metrics, note = _json(folder / "metrics.json", {}), _json(folder / "run.json", {})
    further = [f"{set_}/{key}" for set_ in experiment.data.further_val for key in _FURTHER]
    measured = {key: float(metrics[key]) for key in (*_MEASURED, *further) if _is_number(metrics.get(key))}
    return Result(
        run=name,
        model=run.model,
        name=run.model if info is None else info.paper_name if papers else _without_size(info.paper_name),
        family=info and info.family,
        variant=info and info.variant,
        paper=next((row for row in table1() if papers and row.model == run.model), None),
        failure=_failure(note, metrics, measured),
        history=_history(folder / "history.csv"),
        measured=measured,
        params=complexity.get("params"),
        flops=complexity.get("flops"),
        macs=complexity.get("macs"),
        speed=speed,
        baseline=_baseline(experiment, name),
    )


def _any_has(results: Sequence[Result], key: str) -> bool:
    return any(key in result.measured for result in results)


def _further(results: Sequence[Result]) -> list[str]:
    """Names of the further validation sets that some run was measured on."""
    names = (key.partition("/")[0] for result in results for key in result.measured if key not in _MEASURED)
    return list(dict.fromkeys(names))


def _failure(
    note: Mapping[str, Any], metrics: Mapping[str, Any], measured: Mapping[str, float]
) -> str | None:
    if note.get("status") == "diverged":
        return f"it diverged ({note.get('message') or 'non-finite loss'}); shown is its best epoch before"
    if "val/top1_pct" not in measured:
        return "it has no validation accuracy"
    if not metrics.get("converged", True):
        return f"its training ended at {measured['val/top1_pct']:.1f}% top-1"
    return None


def _baseline(experiment: Experiment, name: str) -> str | None:
    """The X that an E or H is measured against: same size and arguments, then nearest in recipe and seed."""
    run = experiment.run(name)
    info = describe(run.model)
    if info is None or info.variant == "X":
        return None
    wanted = ("X", info.family, info.size, _shape(run.args))
    fits = []
    for other, candidate in experiment.models.items():
        theirs = describe(candidate.model)
        if theirs and (theirs.variant, theirs.family, theirs.size, _shape(candidate.args)) == wanted:
            same_seed = experiment.seed_of(other) == experiment.seed_of(name)
            fits.append((2 * _alike(experiment, run.recipe, candidate.recipe) + same_seed, other))
    return max(fits, key=lambda fit: fit[0])[1] if fits else None


def _alike(experiment: Experiment, recipe: str, other: str) -> bool:
    """Whether both are one recipe, or what sweeps made of one."""
    tuned = experiment.sweeps.tuned
    if recipe in tuned and other in tuned:
        return tuned[recipe].base == tuned[other].base
    return recipe == other


def _shape(args: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in args.items() if key not in _SHAPELESS}


def _compare(result: Result, baseline: Result | None) -> Result:
    if baseline is None:
        return result
    conditions = ("device", "dtype", "batch_size", "compiled")
    alike = all(result.speed.get(key) == baseline.speed.get(key) for key in conditions)
    return replace(
        result,
        throughput_ratio=_ratio(result.img_per_s, baseline.img_per_s) if alike else None,
        flop_ratio=_ratio(baseline.flops, result.flops),
    )


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _without_size(paper_name: str) -> str:
    """ "E(ResMLP-B24)" -> "E(ResMLP)"."""
    return re.sub(r"-[TSBLH]\d*(?=\W|$)", "", paper_name)


def _json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else default


def _history(path: Path) -> tuple[Mapping[str, float], ...]:
    if not path.is_file():
        return ()
    with path.open(newline="") as lines:
        return tuple(
            {key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(lines)
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _flop_unit(results: Sequence[Result]) -> tuple[float, str]:
    return (1e9, "GFLOPs") if any((r.flops or 0) >= 1e9 for r in results) else (1e6, "MFLOPs")


def _param_unit(results: Sequence[Result]) -> tuple[float, str]:
    return (1e6, "M") if any((r.params or 0) >= 1e6 for r in results) else (1e3, "k")


def _fixed(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _figures(value: float | None, unit: float) -> str:
    """Three significant digits, as far as the decimal point."""
    if value is None:
        return "–"
    value /= unit
    return f"{value:,.{max(0, min(3, 2 - math.floor(math.log10(value or 1))))}f}"


def _paper_top1(paper: Table1Row | None) -> str:
    return "†" if paper and paper.top1 is None else _fixed(paper and paper.top1, 1)


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}" if value < 0.01 else f"{value:.2f}"


def _render(template: str, *, autoescape: bool, **content: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment.get_template(template).render(**content)
