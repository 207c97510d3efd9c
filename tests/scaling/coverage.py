"""How often the 90 % intervals of a scaling study hold the true value, in simulation.

python -m tests.scaling.coverage [repetitions]      # the figures in docs/scaling.md
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.scaling.fits import compute_multiplier
from pipeline.scaling.isoflop import fit_profiles
from pipeline.scaling.resampling import draw_cells, make_cells
from pipeline.scaling.runs import Series, load_study
from pipeline.scaling.surfaces import fit_surface
from tests.scaling.synthetic import Arm, Plan, X, write_study

MULTIPLIER, SIZE = 1.8, 1.8
"""The arm has the loss of X with this size and this many times the compute, in the sizes divided by it: so the error of
the parabolas is the same for both, and the noise is all that an interval has to cover."""

PLAN = Plan(
    arms={
        "x": Arm(X),
        "e": Arm(X._replace(A=X.A * SIZE**-X.a, B=X.B * (MULTIPLIER / SIZE) ** -X.b), flops=1 / SIZE),
    },
    budgets=np.geomspace(3e11, 1e14, 5),
    seed_noise=0.01,
    image_noise=1.0,
    run_noise=0.3,
    num_images=400,
    settings={"bootstrap": 150},
)

TRUTH = {"multiplier": MULTIPLIER, "a": X.a, "b": X.b, "frontier": X.a * X.b / (X.a + X.b)}


def simulate(plan: Plan, repetitions: int) -> Mapping[str, float]:
    """Returns the share of the repetitions in which each interval holds the truth; for `identified`, in which the
    surface is. The shares of its exponents are of those."""
    base, ours = Series("x"), Series("e")
    held, identified = dict.fromkeys(TRUTH, 0), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for repetition in range(repetitions):
            write_study(folder, plan, repetition)
            study = load_study(folder)
            all_cells = make_cells(study)
            cells = {s: [cell for cell in all_cells if cell.series == s] for s in (base, ours)}
            profiles = {series: fit_profiles(found) for series, found in cells.items()}
            found = {"multiplier": compute_multiplier(profiles, profiles, ours, base, study.confidence).average}
            counts = draw_cells(all_cells, study.bootstrap, study.seed)
            surface = fit_surface(cells[base], counts, study.confidence)
            identified += surface.is_identified
            for name, estimate in {**surface.estimates, **found}.items():
                if name in TRUTH:
                    held[name] += estimate is not None and estimate.holds(TRUTH[name])
    totals = {name: repetitions if name == "multiplier" else max(identified, 1) for name in TRUTH}
    return {name: held[name] / totals[name] for name in TRUTH} | {"identified": identified / repetitions}


if __name__ == "__main__":
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print("| seeds | noise of seeds | compute multiplier | a | b | ab / (a + b) | identified |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for seeds in (1, 2, 3):
        for noise in (0.01, 0.03):
            shares = simulate(replace(PLAN, seeds=seeds, seed_noise=noise), repetitions)
            cells = " | ".join(f"{100 * share:.0f} %" for share in shares.values())
            print(f"| {seeds} | {noise:.0%} | {cells} |", flush=True)
