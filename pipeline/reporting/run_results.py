"""The results of every run: accuracy, cost and gain over the baseline.

All data comes from files: outputs/<run>/ and the measurements in reports/. A run that lacks some of them, or did not
converge, still has a result, marked with a dagger.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flopeq.hub.model_card import failure_reason
from flopeq.measure.paper import Table1Row, strip_size, table1
from flopeq.registry import ModelInfo, describe
from pipeline.base.config import Experiment
from pipeline.base.files import read_json
from pipeline.evaluation import pairing, predictions, statistics
from pipeline.evaluation.pairing import Comparison
from pipeline.evaluation.predictions import ImageHits
from pipeline.evaluation.statistics import Interval
from pipeline.reporting import baselines
from pipeline.reporting.pooled_seeds import PooledSeeds, difference_metrics, pooled_metrics
from pipeline.reporting.speed import Quartiles, quartiles_of, ratios_of_passes, with_quartiles
from pipeline.training.failures import FAILURE_FILE

METRIC_NAMES = (
    "val/top1_pct",
    "val/top1_low_pct",
    "val/top1_high_pct",
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
    """For E and H: the run of X of the same size and arguments; of several, nearest in recipe and seed. For S: the run
    whose weights it uses."""
    symmetrized_baseline: str | None
    """For E and H: the first symmetrized run of the baseline."""
    own_recipe_run: str | None
    """For a recipe from a sweep: the run of the same network with the recipe that the sweep started from."""
    run_info: Mapping[str, Any]
    """The content of run.json."""
    hits: ImageHits | None = field(repr=False, compare=False)
    """The validation images that the run classifies correctly; None without predictions.parquet."""
    throughput_ratios: tuple[float, ...] = ()
    """Images per second over the baseline's, for each pair of neighbouring passes."""
    flop_ratio: float | None = None
    """The baseline's FLOPs over this run's."""
    minus_baseline: Comparison | None = None
    """Top-1 minus the baseline's, one seed of each."""
    minus_symmetrized: Comparison | None = None
    """Top-1 minus that of `symmetrized_baseline`, one seed of each."""
    minus_own_recipe: Comparison | None = None
    """Top-1 minus that of `own_recipe_run`, one seed of each."""
    pooled: PooledSeeds | None = None
    """What all seeds of the run's group reach together; None before any of them has predictions."""

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
    def top1_interval(self) -> Interval | None:
        """95 % interval of the top-1 over images, in percent (Wilson)."""
        bounds = [self.metrics.get(f"val/top1_{side}_pct") for side in ("low", "high")]
        return None if None in bounds else Interval(*bounds)  # pyright: ignore[reportArgumentType]

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
        found = quartiles_of(self.throughput_ratios)
        return found and found.median

    @property
    def data_wait_pct(self) -> float | None:
        """Mean share of an epoch's training in which the slowest worker had no batch; None if it was not measured."""
        known = [row["perf/data_wait_pct"] for row in self.history if "perf/data_wait_pct" in row]
        known = [value for value in known if math.isfinite(value)]
        return sum(known) / len(known) if known else None

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
        """Fraction of the saved FLOPs that becomes speed: the throughput ratio over the FLOP ratio.

        None for a symmetrized run, which saves no FLOPs.
        """
        if self.throughput_ratio is None or self.flop_ratio is None or self.variant == "S":
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
            "perf/data_wait_pct": self.data_wait_pct,
            **difference_metrics("difference/to_x", self.minus_baseline),
            **difference_metrics("difference/to_symmetrized", self.minus_symmetrized),
            **difference_metrics("difference/to_own_recipe", self.minus_own_recipe),
            **pooled_metrics(self.pooled),
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
        for name in experiment.run_names
    }
    pooled = {group: _pool(members, results) for group, members in _members_by_group(results.values()).items()}
    return [
        replace(
            _add_ratios(result, results.get(result.baseline or "")),
            minus_baseline=_compare([result], result.baseline, results, all_seeds=False),
            minus_symmetrized=_compare([result], result.symmetrized_baseline, results, all_seeds=False),
            minus_own_recipe=_compare([result], result.own_recipe_run, results, all_seeds=False),
            pooled=pooled[result.group],
        )
        for result in results.values()
    ]


def group_by_seed(results: Sequence[RunResult]) -> list[list[RunResult]]:
    """Groups runs that differ only in their seed, in the order of the first run of each group."""
    return list(_members_by_group(results).values())


def converged_members(members: Sequence[RunResult]) -> Sequence[RunResult]:
    """Returns the members that converged, or all if none did."""
    return [member for member in members if member.converged] or members


def compare_runs(results: Sequence[RunResult]) -> list[Comparison]:
    """Returns every comparison of the study, seeds together.

    They are of E, H and S with X, of E and H with S(X), and of tuned recipes with their base.
    """
    pooled = [members[0].pooled for members in group_by_seed(results)]
    return [comparison for found in pooled if found for comparison in found.comparisons]


def seed_spread(members: Sequence[RunResult], value: Callable[[RunResult], float | None]) -> SeedSpread | None:
    """Returns the spread of a value over the converged members, or over all if none converged; None without values."""
    known = [found for member in converged_members(members) if (found := value(member)) is not None]
    return SeedSpread(sum(known) / len(known), min(known), max(known), len(known)) if known else None


def pooled_throughput_ratio(members: Sequence[RunResult]) -> Quartiles | None:
    """Returns the throughput over the baseline's, over the passes of all seeds, which compute the same function."""
    return quartiles_of([ratio for member in members for ratio in member.throughput_ratios])


def _load_result(
    experiment: Experiment, name: str, folder: Path, complexity: Mapping[str, Any], throughput: Mapping[str, Any]
) -> RunResult:
    run = experiment.run(name)
    is_symmetrized = name in experiment.symmetrized
    info = describe(run.model, run.args, symmetrized=is_symmetrized)
    is_paper_model = not run.args and experiment.data.image_size == _PAPER_IMAGE_SIZE
    failed = read_json(folder / FAILURE_FILE, {})  # what else is there belongs to an earlier training
    metrics, run_info = ({} if failed else read_json(folder / f"{file}.json", {}) for file in ("metrics", "run"))
    further = [f"{set_}/{key}" for set_ in experiment.data.further_val for key in FURTHER_METRICS]
    measured = {key: float(metrics[key]) for key in (*METRIC_NAMES, *further) if _is_number(metrics.get(key))}
    return RunResult(
        run=name,
        group=baselines.seed_group(experiment, name),
        model=run.model,
        recipe=run.recipe,
        seed=experiment.seed_of(name),
        name=_network_name(run.model, info, is_paper_model, is_symmetrized),
        family=info and info.family,
        variant="S" if is_symmetrized else info and info.variant,
        paper=next((row for row in table1() if is_paper_model and row.model == run.model and not is_symmetrized), None),
        failure=(f"its training failed ({failed['message']})" if failed else failure_reason(run_info, metrics))
        or (None if "val/top1_pct" in measured else "it has no validation accuracy"),
        history=() if failed else _load_history(folder / "history.csv"),
        metrics=measured,
        params=complexity.get("params"),
        flops=complexity.get("flops"),
        macs=complexity.get("macs"),
        throughput=throughput,
        baseline=baselines.baseline_of(experiment, name),
        symmetrized_baseline=baselines.symmetrized_baseline_of(experiment, name),
        own_recipe_run=baselines.own_recipe_run_of(experiment, name),
        run_info=run_info,
        hits=None if failed else predictions.read_hits(folder),
    )


def _network_name(model: str, info: ModelInfo | None, is_paper_model: bool, is_symmetrized: bool) -> str:
    if info is None:
        return f"S({model})" if is_symmetrized else model
    return info.paper_name if is_paper_model else strip_size(info.paper_name)


def _add_ratios(result: RunResult, baseline: RunResult | None) -> RunResult:
    if baseline is None:
        return result
    return replace(
        result,
        throughput_ratios=ratios_of_passes(result.throughput, baseline.throughput),
        flop_ratio=_ratio(baseline.flops, result.flops),
    )


def _members_by_group(results: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def _pool(members: Sequence[RunResult], results: Mapping[str, RunResult]) -> PooledSeeds | None:
    hits = _known_hits(members)
    if not hits:
        return None
    values = np.stack([each.hits for each in hits])
    interval = (
        statistics.wilson_interval(int(values.sum()), values.size)
        if len(hits) == 1
        else statistics.bootstrap_interval(values)
    )
    return PooledSeeds(
        len(hits),
        100 * float(values.mean()),
        interval.scaled(100),
        _compare(members, members[0].baseline, results, all_seeds=True),
        _compare(members, members[0].own_recipe_run, results, all_seeds=True),
        _compare(members, members[0].symmetrized_baseline, results, all_seeds=True),
    )


def _compare(
    members: Sequence[RunResult], other: str | None, results: Mapping[str, RunResult], *, all_seeds: bool
) -> Comparison | None:
    """Compares runs with another run, or with all of its seeds; None if there is none, or no predictions."""
    if other is None:
        return None
    others = [r for r in results.values() if r.group == results[other].group] if all_seeds else [results[other]]
    hits, other_hits = _known_hits(members), _known_hits(others)
    if not hits or not other_hits:
        return None
    return pairing.compare(members[0].run, hits, others[0].run, other_hits)


def _known_hits(members: Sequence[RunResult]) -> list[ImageHits]:
    return [member.hits for member in converged_members(members) if member.hits is not None]


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _load_history(path: Path) -> tuple[Mapping[str, float], ...]:
    if not path.is_file():
        return ()
    with path.open(newline="") as lines:
        return tuple({key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(lines))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
