"""What several seeds of a network reach together, and differences in top-1 as metrics."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.evaluation.pairing import Comparison
from pipeline.evaluation.statistics import Interval


@dataclass(frozen=True)
class PooledSeeds:
    """What the seeds of a group reach together. Those that did not converge are left out, unless none did."""

    num_seeds: int
    top1_pct: float
    """Mean over the seeds."""
    top1_interval: Interval
    """95 % interval of the top-1, in percent: over images for one seed (Wilson), over seeds and images for several."""
    minus_baseline: Comparison | None = None
    """Their top-1 minus that of all seeds of the baseline."""
    minus_own_recipe: Comparison | None = None
    """Their top-1 minus that of all seeds with the recipe that theirs was tuned from."""
    minus_symmetrized: Comparison | None = None
    """Their top-1 minus that of all seeds of the symmetrized baseline."""

    @property
    def comparisons(self) -> list[Comparison]:
        """All comparisons that there are."""
        known = (self.minus_baseline, self.minus_symmetrized, self.minus_own_recipe)
        return [comparison for comparison in known if comparison is not None]


def difference_metrics(name: str, comparison: Comparison | None) -> dict[str, float | None]:
    """Returns a difference with its interval and test, under names that start with `name`; nothing for None."""
    if comparison is None:
        return {}
    return {
        f"{name}_pct": comparison.difference_pct,
        f"{name}_low_pct": comparison.interval.low,
        f"{name}_high_pct": comparison.interval.high,
        f"{name}_mcnemar_p": comparison.mcnemar_p,
    }


def pooled_metrics(pooled: PooledSeeds | None) -> dict[str, float | None]:
    """Returns what several seeds reach together; nothing where one seed is compared with one."""
    if pooled is None or (pooled.num_seeds == 1 and all(c.mcnemar_p is not None for c in pooled.comparisons)):
        return {}
    return {
        "seeds/num": pooled.num_seeds,
        "seeds/top1_pct": pooled.top1_pct,
        "seeds/top1_low_pct": pooled.top1_interval.low,
        "seeds/top1_high_pct": pooled.top1_interval.high,
        **difference_metrics("seeds/to_x", pooled.minus_baseline),
        **difference_metrics("seeds/to_symmetrized", pooled.minus_symmetrized),
        **difference_metrics("seeds/to_own_recipe", pooled.minus_own_recipe),
    }
