"""The split sweep: where a hybrid should stop being equivariant, for each family of models."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from flopeq.benchmark import throughput
from flopeq.build import build
from flopeq.flops import complexity
from pipeline import pareto, sweep
from pipeline.config import Experiment
from pipeline.hybrids import hybrid, splits_of
from pipeline.trial import STATES, Outcome, Spec
from pipeline.tuning import write_trials

FOLDER = Path("sweeps/hybrid")


def sweep_hybrid(experiment: Experiment) -> dict[str, Any]:
    """Runs the sweep, or goes on with it, and writes sweeps/hybrid/. Returns its findings, a run's under its name.

    Raises: ConfigError, ShardError, ClusterError: what is wrong with the parameters, the data, the cluster.
    """
    settings = experiment.sweeps.hybrid
    splits = {name: splits_of(experiment, name) for name in settings.runs}
    stage = sweep.Stage(experiment, "hybrid", settings)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not splits:
        _write([], {}, {})
        return {}
    specs = {name: _specs(stage, name, of) for name, of in splits.items()}
    trials = sum(map(len, specs.values()))
    stage.announce(trials, [spec for of in specs.values() for spec in of])
    outcomes, board = sweep.run(stage, {name: _plan(of) for name, of in specs.items()}, trials=trials)
    rows = _measured(experiment, outcomes, splits, stage.shards.num_classes)
    findings = {name: finding([row for row in rows if row["run"] == name], settings.flop_budget) for name in splits}
    _write(rows, outcomes, findings)

    from pipeline import sweep_figures

    for picture in sweep_figures.hybrid(FOLDER):
        (FOLDER / f"{picture.name}.png").write_bytes(picture.png)
    best = {name: found["best"] for name, found in findings.items() if found["best"]}
    numbers = {f"best/{name}/{key}": of[key] for name, of in best.items() for key in ("k", "top1_pct")}
    cost = sum(outcome.seconds for of in outcomes.values() for outcome in of)
    board.close({**numbers, "cost/train_s": cost}, sorted(path for path in FOLDER.iterdir() if path.is_file()))
    return findings


def finding(rows: Sequence[Mapping[str, Any]], flop_budget: float) -> dict[str, Any]:
    """Of one family's rows: the best split within the budget, and those that it is not told apart from."""
    reached = [row for row in rows if row["top1"]]
    affordable = [row for row in reached if row["flop_fraction"] is not None and row["flop_fraction"] <= flop_budget]
    best = max(affordable, key=lambda row: row["top1_pct"], default=None)
    alike = [
        row["k"] for row in reached
        if best and row is not best and not pareto.beyond_spread(best["top1"], row["top1"])
        and not pareto.beyond_spread(row["top1"], best["top1"])
    ]
    return {
        "flop_budget": flop_budget,
        "best": best and dict(best),
        "alike": alike,
        "above": [row["k"] for row in reached if best and pareto.beyond_spread(row["top1"], best["top1"])],
        "front": [row["k"] for row in rows if row["on_front"]],
    }


def _specs(stage: sweep.Stage, run_name: str, splits: Sequence[int]) -> list[Spec]:
    first, recipe = stage.experiment.seed_of(run_name), stage.experiment.recipe(run_name)
    seeds = range(first, first + stage.settings.seeds)
    return [
        stage.spec(run_name, number, 0, seed, {"num_flop_blocks": k}, hybrid(stage.experiment, run_name, k), recipe)
        for number, (seed, k) in enumerate(itertools.product(seeds, splits))
    ]


def _plan(specs: list[Spec]) -> sweep.Plan:
    yield specs


def _measured(
    experiment: Experiment, outcomes: Mapping[str, Sequence[Outcome]], splits: Mapping[str, Sequence[int]],
    num_classes: int,
) -> list[dict[str, Any]]:
    """A row for every split of every family: what it reached, and what the full-size model costs."""
    wanted, side = experiment.throughput, experiment.data.image_size
    on_gpu = experiment.train.gpu is not False and torch.cuda.is_available()
    rows = []
    for name, of in splits.items():
        runs = {k: hybrid(experiment, name, k) for k in of}
        counted = {
            k: complexity(build(run.model, device="meta", num_classes=num_classes, **run.args), (3, side, side))
            for k, run in runs.items()
        }
        x = hybrid(experiment, name, 0)
        x_flops = complexity(build(x.model, device="meta", num_classes=num_classes, **x.args), (3, side, side)).flops
        speed = throughput(
            {str(k): build(run.model, num_classes=num_classes, **run.args) for k, run in runs.items()},
            image_size=(3, side, side), batch_size=wanted.batch_size, warmup=wanted.warmup, runs=wanted.runs,
            dtype=getattr(torch, wanted.dtype), compile=experiment.sweeps.hybrid.compile,
            device="cuda" if on_gpu else "cpu",
        )
        family = []
        for k in of:
            ended = [o for o in outcomes[name] if o.spec.params["num_flop_blocks"] == k]
            top1 = [o.top1_pct for o in ended if o.state == "finished" and o.top1_pct is not None]
            states = Counter(outcome.state for outcome in ended)
            family.append({
                "run": name, "k": k, "depth": max(of), "top1_pct": fmean(top1) if top1 else None, "top1": top1,
                "params": counted[k].params, "flops": counted[k].flops, "flop_fraction": counted[k].flops / x_flops,
                "img_per_s": speed[str(k)].img_per_s, **{state: states[state] for state in STATES},
            })
        reached = [row for row in family if row["top1"]]
        front = pareto.front([(row["flops"], row["top1_pct"]) for row in reached])
        on_front = {reached[number]["k"] for number in front}
        rows += [{**row, "on_front": row["k"] in on_front} for row in family]
    return rows


def _write(
    rows: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Sequence[Outcome]], findings: Mapping[str, Any]
) -> None:
    write_trials(FOLDER / "trials.csv", outcomes)
    (FOLDER / "findings.json").write_text(json.dumps({"runs": findings, "splits": rows}, indent=2) + "\n")
    with (FOLDER / "splits.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        columns = ("run", "k", "top1_pct", "params", "flops", "flop_fraction", "img_per_s", "on_front", *STATES)
        table.writerow([*columns, "top1_pct_min", "top1_pct_max"])
        for row in rows:
            lowest, highest = (min(row["top1"]), max(row["top1"])) if row["top1"] else ("", "")
            table.writerow([*(row[column] for column in columns), lowest, highest])
