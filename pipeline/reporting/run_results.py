"""The results of every run: accuracy, cost and gain over the baseline.

All data comes from files: outputs/<run>/ and the measurements in reports/. A run that lacks some of them, or did not
converge, still has a result, marked with a dagger.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from flopeq.hub.model_card import failure_reason
from flopeq.measure.paper import Table1Row, strip_size, table1
from flopeq.registry import describe
from pipeline.base.config import Experiment
from pipeline.base.files import read_json
from pipeline.reporting.speed import Quartiles, quartiles_of, ratios_of_passes, with_quartiles

METRIC_NAMES = (
    "val/top1_pct",
    "val/top5_pct",
    "val/loss",
    "val/flop_agreement_pct",
    "equivariance/max_rel_error",
    "val/ema_top1_pct",
    "val/ema_top5_pct",
    "val/real_top1_pct",
)

FURTHER_METRICS = {"top1_pct": "top-1 %", "top5_pct": "top-5 %"}
"""Metrics of a further validation set."""

_PAPER_IMAGE_SIZE = 224

NON_SHAPE_ARGS = ("num_flop_blocks", "head", "init_values", "ls_init_value")
"""Arguments in which X and its E may differ."""


@dataclass(frozen=True)
class RunResult:
    """The results of one run. None: not measured, or not defined for it."""

    run: str
    group: str
    """The first run that differs from this one only in its seed, or the run itself."""
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
    metrics: Mapping[str, float]
    """The numbers of metrics.json."""
    params: int | None
    flops: int | None
    """In the paper's convention, per image."""
    macs: int | None
    throughput: Mapping[str, Any]
    """The run's entry in throughput.json."""
    baseline: str | None
    """For E and H: the run of X of the same size and arguments; of several, nearest in recipe and seed."""
    run_info: Mapping[str, Any]
    """The content of run.json."""
    throughput_ratios: tuple[float, ...] = ()
    """Images per second over the baseline's, for each pair of neighbouring passes."""
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
        return self.metrics.get("val/top1_pct")

    @property
    def img_per_s(self) -> float | None:
        return self.throughput.get("img_per_s")

    @property
    def throughput_quartiles(self) -> Quartiles | None:
        """Images per second."""
        if self.img_per_s is None:
            return None
        first, third = self.throughput["img_per_s_quartiles"]
        return Quartiles(first, self.img_per_s, third)

    @property
    def ms_per_img(self) -> list[float]:
        """Milliseconds per image of each timed pass."""
        return [1000 * seconds / self.throughput["batch_size"] for seconds in self.throughput.get("pass_s", ())]

    @property
    def throughput_ratio(self) -> float | None:
        """Median of `throughput_ratios`."""
        return statistics.median(self.throughput_ratios) if self.throughput_ratios else None

    @property
    def mlflow_run_id(self) -> str | None:
        return self.run_info.get("mlflow_run_id")

    @property
    def throughput_conditions(self) -> str:
        """How the throughput was measured; empty if it was not."""
        if not self.throughput:
            return ""
        compiled = "compiled" if self.throughput["compiled"] else "eager"
        device, dtype, batch_size = (self.throughput[key] for key in ("device", "dtype", "batch_size"))
        return f"{device}, {dtype}, batch {batch_size}, {compiled}"

    @property
    def share(self) -> float | None:
        """Fraction of the saved FLOPs that becomes speed: the throughput ratio over the FLOP ratio."""
        if self.throughput_ratio is None or self.flop_ratio is None:
            return None
        return self.throughput_ratio / self.flop_ratio

    def all_metrics(self) -> dict[str, float | bool]:
        """Returns all metrics under their names in metrics.json and MLflow."""
        numbers = {
            "converged": self.converged,
            **self.metrics,
            "complexity/params_m": self.params and self.params / 1e6,
            "complexity/gflops": self.flops and self.flops / 1e9,
            "complexity/gmacs": self.macs and self.macs / 1e9,
            **with_quartiles("perf/forward_img_per_s", self.throughput_quartiles),
            "perf/peak_mem_mb": self.throughput.get("peak_mem_mb"),
            **with_quartiles("perf/throughput_ratio", quartiles_of(self.throughput_ratios)),
            "complexity/flop_ratio": self.flop_ratio,
            "perf/share": self.share,
        }
        return {key: value for key, value in numbers.items() if value is not None}


class SeedSpread(NamedTuple):
    """Mean, lowest and highest of n values."""

    mean: float
    low: float
    high: float
    n: int


def load_results(
    experiment: Experiment, outputs: Path = Path("outputs"), reports: Path = Path("reports")
) -> list[RunResult]:
    """Loads the results of every run in params.yaml, in its order."""
    complexity = {entry["run"]: entry for entry in read_json(reports / "complexity.json", [])}
    throughput = {entry["run"]: entry for entry in read_json(reports / "throughput.json", [])}
    results = {
        name: _load_result(experiment, name, outputs / name, complexity.get(name, {}), throughput.get(name, {}))
        for name in experiment.models
    }
    return [_add_ratios(result, results.get(result.baseline or "")) for result in results.values()]


def group_by_seed(results: Sequence[RunResult]) -> list[list[RunResult]]:
    """Groups runs that differ only in their seed, in the order of the first run of each group."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return list(groups.values())


def seed_spread(members: Sequence[RunResult], value: Callable[[RunResult], float | None]) -> SeedSpread | None:
    """Returns the spread of a value over the converged members, or over all if none converged; None without values."""
    good = [member for member in members if member.converged] or members
    known = [found for member in good if (found := value(member)) is not None]
    return SeedSpread(sum(known) / len(known), min(known), max(known), len(known)) if known else None


def _load_result(
    experiment: Experiment, name: str, folder: Path, complexity: Mapping[str, Any], throughput: Mapping[str, Any]
) -> RunResult:
    run = experiment.run(name)
    info = describe(run.model)
    is_paper_model = not run.args and experiment.data.image_size == _PAPER_IMAGE_SIZE
    metrics, run_info = read_json(folder / "metrics.json", {}), read_json(folder / "run.json", {})
    further = [f"{set_}/{key}" for set_ in experiment.data.further_val for key in FURTHER_METRICS]
    measured = {key: float(metrics[key]) for key in (*METRIC_NAMES, *further) if _is_number(metrics.get(key))}
    return RunResult(
        run=name,
        group=_seed_group(experiment, name),
        model=run.model,
        recipe=run.recipe,
        seed=experiment.seed_of(name),
        name=run.model if info is None else info.paper_name if is_paper_model else strip_size(info.paper_name),
        family=info and info.family,
        variant=info and info.variant,
        paper=next((row for row in table1() if is_paper_model and row.model == run.model), None),
        failure=failure_reason(run_info, metrics)
        or (None if "val/top1_pct" in measured else "it has no validation accuracy"),
        history=_load_history(folder / "history.csv"),
        metrics=measured,
        params=complexity.get("params"),
        flops=complexity.get("flops"),
        macs=complexity.get("macs"),
        throughput=throughput,
        baseline=_baseline(experiment, name),
        run_info=run_info,
    )


def _seed_group(experiment: Experiment, name: str) -> str:
    run = experiment.run(name)
    return next(
        other
        for other, other_run in experiment.models.items()
        if other_run.model_copy(update={"seed": run.seed}) == run
    )


def _baseline(experiment: Experiment, name: str) -> str | None:
    """Returns the X that an E or H is compared with: same size and arguments, then nearest in recipe and seed."""
    run = experiment.run(name)
    info = describe(run.model)
    if info is None or info.variant == "X":
        return None
    key = ("X", info.family, info.size, _shape_args(run.args))
    candidates = []
    for other, candidate in experiment.models.items():
        candidate_info = describe(candidate.model)
        if (
            candidate_info
            and (candidate_info.variant, candidate_info.family, candidate_info.size, _shape_args(candidate.args)) == key
        ):
            same_seed = experiment.seed_of(other) == experiment.seed_of(name)
            candidates.append((2 * _same_base_recipe(experiment, run.recipe, candidate.recipe) + same_seed, other))
    return max(candidates, key=lambda fit: fit[0])[1] if candidates else None


def _same_base_recipe(experiment: Experiment, recipe: str, other: str) -> bool:
    """Whether both are the same recipe, or were tuned from the same base."""
    tuned = experiment.sweeps.tuned
    if recipe in tuned and other in tuned:
        return tuned[recipe].base == tuned[other].base
    return recipe == other


def _shape_args(args: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in args.items() if key not in NON_SHAPE_ARGS}


def _add_ratios(result: RunResult, baseline: RunResult | None) -> RunResult:
    if baseline is None:
        return result
    return replace(
        result,
        throughput_ratios=ratios_of_passes(result.throughput, baseline.throughput),
        flop_ratio=_ratio(baseline.flops, result.flops),
    )


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _load_history(path: Path) -> tuple[Mapping[str, float], ...]:
    if not path.is_file():
        return ()
    with path.open(newline="") as lines:
        return tuple({key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(lines))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
