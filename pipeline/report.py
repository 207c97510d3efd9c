"""What every run of the experiment reached, cost and gained.

Everything comes from files: outputs/<run>/ and the measurements in reports/. A run without some of them, or
one that did not converge, has its result all the same, with a dagger.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from flopeq.card import failure
from flopeq.paper import Table1Row, table1, without_size
from flopeq.registry import describe
from pipeline.config import Experiment
from pipeline.files import read_json

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
FURTHER = {"top1_pct": "top-1 %", "top5_pct": "top-5 %"}
"""Metrics of a further validation set."""
_PAPER_IMAGE_SIZE = 224
_SHAPELESS = ("num_flop_blocks", "head", "init_values", "ls_init_value")
"""Arguments in which X and its E may differ."""


@dataclass(frozen=True)
class Result:
    """What is known of one run; None: not measured, or not defined for it."""

    run: str
    group: str
    """The first run that differs from this one in nothing but its seed, or itself."""
    model: str
    recipe: str
    seed: int
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
    note: Mapping[str, Any]
    """What run.json holds."""
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
    def mlflow_run_id(self) -> str | None:
        return self.note.get("mlflow_run_id")

    @property
    def conditions(self) -> str:
        """How its throughput was measured; empty: it was not."""
        if not self.speed:
            return ""
        compiled = "compiled" if self.speed["compiled"] else "eager"
        return f"{self.speed['device']}, {self.speed['dtype']}, batch {self.speed['batch_size']}, {compiled}"

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


class Spread(NamedTuple):
    """Mean, lowest and highest of n values."""

    mean: float
    low: float
    high: float
    n: int


def collect(
    experiment: Experiment, outputs: Path = Path("outputs"), reports: Path = Path("reports")
) -> list[Result]:
    """The results of every run in params.yaml, in its order."""
    complexity = {entry["run"]: entry for entry in read_json(reports / "complexity.json", [])}
    throughput = {entry["run"]: entry for entry in read_json(reports / "throughput.json", [])}
    results = {
        name: _read(experiment, name, outputs / name, complexity.get(name, {}), throughput.get(name, {}))
        for name in experiment.models
    }
    return [_compare(result, results.get(result.baseline or "")) for result in results.values()]


def grouped(results: Sequence[Result]) -> list[list[Result]]:
    """Runs that differ in nothing but their seed, together, where the first of them stands."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return list(groups.values())


def spread(members: Sequence[Result], value: Callable[[Result], float | None]) -> Spread | None:
    """Of a value over a group: of the members that converged, or of all where none did; None where it is nowhere."""
    good = [member for member in members if member.converged] or members
    known = [found for member in good if (found := value(member)) is not None]
    return Spread(sum(known) / len(known), min(known), max(known), len(known)) if known else None


def _read(
    experiment: Experiment, name: str, folder: Path, complexity: Mapping[str, Any], speed: Mapping[str, Any]
) -> Result:
    run = experiment.run(name)
    info = describe(run.model)
    papers = not run.args and experiment.data.image_size == _PAPER_IMAGE_SIZE
    metrics, note = read_json(folder / "metrics.json", {}), read_json(folder / "run.json", {})
    further = [f"{set_}/{key}" for set_ in experiment.data.further_val for key in FURTHER]
    measured = {key: float(metrics[key]) for key in (*_MEASURED, *further) if _is_number(metrics.get(key))}
    return Result(
        run=name,
        group=_group(experiment, name),
        model=run.model,
        recipe=run.recipe,
        seed=experiment.seed_of(name),
        name=run.model if info is None else info.paper_name if papers else without_size(info.paper_name),
        family=info and info.family,
        variant=info and info.variant,
        paper=next((row for row in table1() if papers and row.model == run.model), None),
        failure=failure(note, metrics) or (None if "val/top1_pct" in measured else "it has no validation accuracy"),
        history=_history(folder / "history.csv"),
        measured=measured,
        params=complexity.get("params"),
        flops=complexity.get("flops"),
        macs=complexity.get("macs"),
        speed=speed,
        baseline=_baseline(experiment, name),
        note=note,
    )


def _group(experiment: Experiment, name: str) -> str:
    run = experiment.run(name)
    return next(other for other, theirs in experiment.models.items()
                if theirs.model_copy(update={"seed": run.seed}) == run)


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


def _history(path: Path) -> tuple[Mapping[str, float], ...]:
    if not path.is_file():
        return ()
    with path.open(newline="") as lines:
        return tuple(
            {key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(lines)
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
