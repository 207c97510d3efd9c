"""Studies whose law is known: runs.csv, losses.parquet and study.json as the stage `scaling` writes them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = (
    *("trial", "study", "arm", "size", "seed", "budget", "params", "flops_image", "images_seen", "unique_images"),
    *("epochs", "compute", "val_loss", "top1_pct", "val_loss_averaged", "top1_averaged_pct", "seconds", "state"),
    "message",
)


class Law(NamedTuple):
    """L = E0 + A F^-a + B D^-b, and what fewer unique images cost: D is at most `reuse` times their number."""

    A: float
    B: float
    E0: float
    a: float
    b: float
    reuse: float = np.inf

    def loss(self, flops_image: float, images: float, unique: float = np.inf) -> float:
        seen = 1 / (1 / images + 1 / (self.reuse * unique)) if np.isfinite(self.reuse) else images
        return self.E0 + self.A * flops_image**-self.a + self.B * seen**-self.b


X = Law(A=60.0, B=90.0, E0=0.15, a=0.3, b=0.45)


@dataclass(frozen=True)
class Arm:
    """An arm's law, its FLOPs in units of the baseline's, and the loss when averaged over the flop, by a factor."""

    law: Law
    flops: float = 1.0
    averaged: float | None = None


@dataclass(frozen=True)
class Plan:
    """A synthetic study. Noise: standard deviations of log loss over seeds and, within a run, over images."""

    arms: Mapping[str, Arm] = field(default_factory=lambda: {"x": Arm(X), "e": Arm(X, flops=0.5)})
    sizes: Sequence[float] = tuple(np.geomspace(3e5, 3e7, 5))
    budgets: Sequence[float] = tuple(np.geomspace(3e11, 3e13, 4))
    seeds: int = 2
    fractions: Sequence[float] = ()
    num_unique: int = 60_000
    num_images: int = 200
    seed_noise: float = 0.0
    image_noise: float = 0.0
    run_noise: float = 0.0
    fail: Callable[[Mapping[str, Any]], str | None] = lambda row: None
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_study(folder: Path, plan: Plan, rng_seed: int = 0) -> None:
    """Writes the files of a study."""
    rng = np.random.default_rng(rng_seed)
    ease = _unit_mean(rng, plan.image_noise, plan.num_images)
    rows, losses = [], {}
    middle_size, middle_budget = len(plan.sizes) // 2, plan.budgets[len(plan.budgets) // 2]
    for name, arm in plan.arms.items():
        for size, flops in enumerate(plan.sizes):
            for budget in plan.budgets:
                in_data_study = size == middle_size and budget == middle_budget
                for fraction in {1.0, *(plan.fractions if in_data_study else ())}:
                    for seed in range(plan.seeds):
                        unique = round(plan.num_unique * fraction)
                        row = _make_row(plan, name, arm, f"w{size}", flops, budget, unique, fraction, seed)
                        rows.append(row)
                        if row["state"] != "finished":
                            continue
                        loss = arm.law.loss(row["flops_image"], row["images_seen"], unique)
                        loss *= np.exp(plan.seed_noise * rng.standard_normal() - plan.seed_noise**2 / 2)
                        image = ease * _unit_mean(rng, plan.run_noise, plan.num_images)
                        _add_losses(row, losses, (loss * image).astype(np.float32), arm.averaged)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if losses:
        pq.write_table(pa.table(losses), folder / "losses.parquet")
    settings = {
        "baseline": "x",
        "equivariant": "e",
        "augmented": "x-flop" if "x-flop" in plan.arms else None,
        "bootstrap": 60,
        "confidence": 0.9,
        "seed": 0,
        "flop_invariant": True,
        "data": "synthetic",
    }
    (folder / "study.json").write_text(json.dumps(settings | dict(plan.settings)))


def _unit_mean(rng: np.random.Generator, noise: float, size: int) -> Any:
    return np.exp(noise * rng.standard_normal(size) - noise**2 / 2)


def _make_row(
    plan: Plan, name: str, arm: Arm, size: str, flops: float, budget: float, unique: int, fraction: float, seed: int
) -> dict[str, Any]:
    flops_image = flops * arm.flops
    images = budget / (3 * flops_image)
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
        "trial": f"{name}-{size}-{budget:.3g}-{unique}-{seed}",
        "study": "compute" if fraction == 1 else "data",
        "arm": name,
        "size": size,
        "seed": seed,
        "budget": repr(float(budget)),
        "params": round(flops_image / 16),
        "flops_image": flops_image,
        "images_seen": images,
        "unique_images": unique,
        "epochs": images / unique,
        "compute": 3 * flops_image * images,
        "seconds": 1.0,
    }
    state = plan.fail(row)
    return row | {"state": state or "finished", "message": f"it {state}" if state else ""}


def _add_losses(row: dict[str, Any], losses: dict[str, Any], image: Any, averaged: float | None) -> None:
    losses[row["trial"]] = image
    row["val_loss"] = repr(float(image.mean(dtype=np.float64)))
    row["top1_pct"] = 90.0
    if averaged is not None:
        losses[f"{row['trial']}/averaged"] = (image * averaged).astype(np.float32)
        row["val_loss_averaged"] = repr(float((image * averaged).astype(np.float32).mean(dtype=np.float64)))
        row["top1_averaged_pct"] = 91.0
