"""The gap between the baseline and the equivariant arm, and the share of it that augmentation and averaging close.

The share of a series is (L_baseline - L_series) / (L_baseline - L_equivariant): 0 for the baseline, 1 for the
equivariant arm. It has no meaning without a gap, so it is given only where the gap's interval is above zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.scaling.intervals import Estimate, estimate_from
from pipeline.scaling.isoflop import Profile
from pipeline.scaling.resampling import Cell
from pipeline.scaling.runs import Series

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Gap:
    """The gap at one number of unique images, or at one budget."""

    budget: float
    unique_images: int
    epochs: float
    """Of the baseline."""
    gap: Estimate | None
    """In nats; above 0 where the equivariant arm is better."""
    closed: Mapping[Series, Estimate | None]
    """Share that each other series closes; None where it is not given."""
    has_seeds: bool
    """Whether baseline and equivariant arm have several seeds there."""

    @property
    def is_open(self) -> bool:
        """Whether the equivariant arm is better."""
        return self.gap is not None and self.gap.low > 0


def gaps_over_images(
    cells: Mapping[Series, Sequence[Cell]], baseline: Series, equivariant: Series, confidence: float
) -> list[Gap]:
    """Returns the gap at each number of unique images that both have, ascending. `cells`: those of the data study."""
    by_images = {series: {cell.unique_images: cell for cell in found} for series, found in cells.items()}
    common = by_images.get(baseline, {}).keys() & by_images.get(equivariant, {}).keys()
    gaps = []
    for images in sorted(common):
        here = {series: found[images] for series, found in by_images.items() if images in found}
        losses = {series: np.concatenate([[cell.loss], cell.draws]) for series, cell in here.items()}
        base = here[baseline]
        has_seeds = min(base.num_seeds, here[equivariant].num_seeds) > 1
        gap, closed = _compare(losses, baseline, equivariant, confidence)
        gaps.append(Gap(base.budget, images, base.epochs, gap, closed, has_seeds))
    return gaps


def gaps_over_budgets(
    profiles: Mapping[Series, Sequence[Profile]],
    cells: Mapping[Series, Sequence[Cell]],
    baseline: Series,
    equivariant: Series,
    confidence: float,
) -> list[Gap]:
    """Returns the gap between the lowest losses at each budget that both have, ascending."""
    by_budget = {series: {profile.budget: profile for profile in found} for series, found in profiles.items()}
    common = by_budget.get(baseline, {}).keys() & by_budget.get(equivariant, {}).keys()
    gaps = []
    for budget in sorted(common):
        losses = {series: np.exp(found[budget].log_loss) for series, found in by_budget.items() if budget in found}
        profile = by_budget[baseline][budget]
        here = [cell for series in (baseline, equivariant) for cell in cells[series] if cell.budget == budget]
        unique = here[0].unique_images
        epochs = float(np.exp(profile.log_c - profile.log_f_opt[0])) / 3 / unique
        gap, closed = _compare(losses, baseline, equivariant, confidence)
        gaps.append(Gap(budget, unique, epochs, gap, closed, all(cell.num_seeds > 1 for cell in here)))
    return gaps


def _compare(
    losses: Mapping[Series, Array], baseline: Series, equivariant: Series, confidence: float
) -> tuple[Estimate | None, dict[Series, Estimate | None]]:
    gap = losses[baseline] - losses[equivariant]
    estimate = estimate_from(gap, confidence)
    others = [series for series in losses if series not in (baseline, equivariant)]
    if estimate is None or estimate.low <= 0:
        return estimate, dict.fromkeys(others)
    closed = {}
    for series in others:
        share = (losses[baseline] - losses[series]) / np.where(gap > 0, gap, np.nan)
        closed[series] = estimate_from(share, confidence)
    return estimate, closed
