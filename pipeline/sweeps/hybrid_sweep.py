"""The split sweep: finds the best number of equivariant blocks, or groups by depth, for each model family."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from flopeq.measure.flops import complexity
from flopeq.measure.throughput import Protocol, measure_throughput_if_fits
from flopeq.models.build import build
from pipeline import cluster
from pipeline.base.config import Experiment
from pipeline.base.schema import Run, Split
from pipeline.sweeps import analysis, engine
from pipeline.sweeps.splits import split_args, split_run, splits_to_try
from pipeline.sweeps.sweep import Sweep
from pipeline.sweeps.trial import TRIAL_STATES, TrialOutcome, TrialSpec, write_trials_csv

OUTPUT_DIR = Path("sweeps/hybrid")


def sweep_hybrid(experiment: Experiment) -> dict[str, Any]:
    """Runs or resumes the sweep and writes sweeps/hybrid/. Returns its findings by run name.

    Raises: ConfigError, ShardError, ClusterError: for invalid parameters, data or cluster.
    """
    settings = experiment.sweeps.hybrid
    splits = {name: splits_to_try(experiment, name) for name in settings.runs}
    sweep = Sweep(experiment, "hybrid", settings)
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    if not splits:
        _write_results([], {}, {})
        return {}
    specs = {name: _make_trials(sweep, name, ks) for name, ks in splits.items()}
    planned = [(1, spec) for trials in specs.values() for spec in trials]
    sweep.log_cost(planned)
    outcomes, reporter = engine.run_sweep(
        sweep, {name: _single_round(trials) for name, trials in specs.items()}, planned=planned
    )
    rows = _measure_splits(experiment, outcomes, splits, sweep.shards.num_classes)
    findings = {
        name: {
            **summarize_splits([row for row in rows if row["run"] == name], settings.flop_budget),
            "epochs": specs[name][0].epochs,
            "full_epochs": experiment.recipe(name).epochs,
        }
        for name in splits
    }
    _write_results(rows, outcomes, findings)

    from pipeline.sweeps import figures

    for picture in figures.draw_hybrid_sweep(OUTPUT_DIR):
        (OUTPUT_DIR / f"{picture.name}.png").write_bytes(picture.png)
    best = {name: found["best"] for name, found in findings.items() if found["best"]}
    numbers = {
        f"best/{name}/{key}": row[key]
        for name, row in best.items()
        for key in ("k", "top1_pct")
        if not isinstance(row[key], str)  # groups by depth, which MLflow does not take for a metric
    }
    cost = sum(outcome.seconds for trials in outcomes.values() for outcome in trials)
    reporter.finish({**numbers, "cost/train_s": cost}, sorted(path for path in OUTPUT_DIR.iterdir() if path.is_file()))
    return findings


def summarize_splits(rows: Sequence[Mapping[str, Any]], flop_budget: float) -> dict[str, Any]:
    """Returns a family's best split within the FLOP budget, and how the others compare with it over the seeds."""
    reached = [row for row in rows if row["top1"]]
    affordable = [row for row in reached if row["flop_fraction"] is not None and row["flop_fraction"] <= flop_budget]
    best = max(affordable, key=lambda row: row["top1_pct"], default=None)
    others = [row for row in reached if best and row is not best]
    better = [row["k"] for row in others if best and analysis.is_better(row["top1"], best["top1"])]
    worse = [row["k"] for row in others if best and analysis.is_better(best["top1"], row["top1"])]
    return {
        "flop_budget": flop_budget,
        "best": best and dict(best),
        "better": better,
        "alike": [row["k"] for row in others if row["k"] not in (*better, *worse)],
        "worse": worse,
        "front": [row["k"] for row in rows if row["on_front"]],
    }


def _make_trials(sweep: Sweep, run_name: str, splits: Sequence[Split]) -> list[TrialSpec]:
    first, recipe = sweep.experiment.seed_of(run_name), sweep.experiment.recipe(run_name)
    seeds = range(first, first + sweep.settings.seeds)
    return [
        sweep.make_trial(
            run_name,
            number,
            0,
            seed,
            split_args(sweep.experiment, run_name, k),
            split_run(sweep.experiment, run_name, k),
            recipe,
        )
        for number, (seed, k) in enumerate(itertools.product(seeds, splits))
    ]


def _single_round(specs: list[TrialSpec]) -> engine.TrialPlan:
    yield specs


def _measure_splits(
    experiment: Experiment,
    outcomes: Mapping[str, Sequence[TrialOutcome]],
    splits: Mapping[str, Sequence[Split]],
    num_classes: int,
) -> list[dict[str, Any]]:
    """Returns a row for every split of every family: its accuracy, and the cost of the full-size model."""
    side, rows = experiment.data.image_size, []
    for name, family_splits in splits.items():
        runs = {k: split_run(experiment, name, k) for k in family_splits}
        complexities = {
            k: complexity(build(run.model, device="meta", num_classes=num_classes, **run.args), (3, side, side))
            for k, run in runs.items()
        }
        x = split_run(experiment, name, 0)
        x_flops = complexity(build(x.model, device="meta", num_classes=num_classes, **x.args), (3, side, side)).flops
        speed = cluster.call_on_gpu(
            _measure_speed, experiment, runs, num_classes=num_classes, settings=experiment.train
        )
        family_rows = []
        for k in family_splits:
            ended = [o for o in outcomes[name] if o.spec.params == split_args(experiment, name, k)]
            top1 = [o.top1_pct for o in ended if o.state == "finished" and o.top1_pct is not None]
            states = Counter(outcome.state for outcome in ended)
            family_rows.append(
                {
                    "run": name,
                    "k": k,
                    "top1_pct": fmean(top1) if top1 else None,
                    "top1": top1,
                    "params": complexities[k].params,
                    "flops": complexities[k].flops,
                    "flop_fraction": complexities[k].flops / x_flops,
                    "img_per_s": speed[k],
                    **{state: states[state] for state in TRIAL_STATES},
                }
            )
        reached = [row for row in family_rows if row["top1"]]
        front = analysis.pareto_front([(row["flops"], row["top1_pct"]) for row in reached])
        on_front = {reached[number]["k"] for number in front}
        rows += [{**row, "on_front": row["k"] in on_front} for row in family_rows]
    return rows


def _measure_speed(experiment: Experiment, runs: Mapping[Split, Run], *, num_classes: int) -> dict[Split, float | None]:
    """Returns the images per second of each split; None for one that does not fit the device's memory."""
    settings, side = experiment.throughput, experiment.data.image_size
    on_gpu = experiment.train.gpu is not False and torch.cuda.is_available()
    measured, _ = measure_throughput_if_fits(
        {str(k): partial(build, run.model, num_classes=num_classes, **run.args) for k, run in runs.items()},
        image_size=(3, side, side),
        protocol=Protocol(
            settings.batch_size,
            settings.warmup,
            settings.runs,
            getattr(torch, settings.dtype),
            experiment.sweeps.hybrid.compile,
        ),
        device="cuda" if on_gpu else "cpu",
    )
    return {k: (result := measured[str(k)]) and result.img_per_s for k in runs}


def _write_results(
    rows: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Sequence[TrialOutcome]], findings: Mapping[str, Any]
) -> None:
    write_trials_csv(OUTPUT_DIR / "trials.csv", outcomes)
    (OUTPUT_DIR / "findings.json").write_text(json.dumps({"runs": findings, "splits": rows}, indent=2) + "\n")
    with (OUTPUT_DIR / "splits.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        columns = ("run", "k", "top1_pct", "params", "flops", "flop_fraction", "img_per_s", "on_front", *TRIAL_STATES)
        table.writerow([*columns, "top1_pct_min", "top1_pct_max"])
        for row in rows:
            lowest, highest = (min(row["top1"]), max(row["top1"])) if row["top1"] else ("", "")
            table.writerow([*(row[column] for column in columns), lowest, highest])
