"""`make plan`: estimates the cost of every run without starting it: `python -m stages.plan [images/s of one GPU]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.base import config
from pipeline.base.errors import ConfigError
from stages import run_stage

if TYPE_CHECKING:
    from pipeline.base.config import Experiment


def run(img_per_s: str | None = None) -> None:
    """Raises: ConfigError for a throughput that is not a positive number."""
    experiment = config.load_experiment()
    rate = None if img_per_s is None else _positive(img_per_s)
    import rich.box
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from pipeline import plan

    console = Console()
    table = Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("run", no_wrap=True)
    for column in (
        "steps",
        "images/\nworker",
        "params\nM",
        "GFLOPs",
        "GPU-\nhours",
        "loaders",
        "state\nGiB",
        "disk\nGiB",
    ):
        table.add_column(column, justify="right", vertical="bottom")
    rows = track(
        plan.estimate_runs(experiment, img_per_s=rate),
        "counting",
        total=len(experiment.models),
        transient=True,
        console=Console(stderr=True),
        disable=not console.is_terminal,
    )
    total, bound = 0.0, []
    for row in rows:
        if row.loaders is not None and row.loaders > max(1, experiment.train.loader_workers):
            bound.append(row.run)
        hours = "?" if row.gpu_hours is None else f"{row.gpu_hours:,.0f}"
        total += row.gpu_hours or 0
        table.add_row(
            row.run,
            f"{row.steps:,}",
            f"{row.images_per_worker:,}",
            f"{row.params_m:.1f}",
            f"{row.gflops:.1f}",
            hours,
            "?" if row.loaders is None else f"{row.loaders}",
            f"{row.state_gib:.1f}",
            f"{row.disk_gib:.1f}",
        )
    console.print(table)
    source = (
        f"{rate:,.0f} images/s of training on one GPU, as given"
        if rate
        else "a third of the paper's forward throughput on an A100, ? where it has none: expect more"
    )
    console.print(
        f"GPU-hours, {total:,.0f} in total: from {source}.\nState: weights, gradients, optimizer and moving average, "
        "without activations. Disk: checkpoints and final weights, without shards.\nLoaders: processes that decode "
        f"images as fast as one GPU trains on them, at {plan.LOADER_IMG_PER_S} images/s each on a core of its own, or "
        f"{plan.LOADER_IMG_PER_S_WITH_POLICY} with an augmentation policy; train.loader_workers is "
        f"{experiment.train.loader_workers}."
    )
    if bound:
        console.print(
            f"Bound by their input, so that an E or H may train no faster than its X: {', '.join(bound)}. They would "
            "take longer than their GPU-hours."
        )
    if experiment.scaling is not None:
        console.print(_describe_study(experiment))


def _describe_study(experiment: Experiment) -> str:
    """Returns what the scaling study would take."""
    from pipeline.scaling import estimate

    found = estimate.estimate_study(experiment)
    trainings, left_out = found.plan.trainings, found.plan.left_out
    lines = [
        f"\nscaling: {len(trainings):,} trainings, {sum(training.compute for training in trainings):.3g} FLOPs, "
        f"{sum(training.images_seen for training in trainings):,} images",
        f"A100-hours, {found.a100_hours:,.0f}: at the FLOPs per second of the paper's forward passes: expect more"
        if found.hours is None
        else f"hours on the CPU cores of this machine if nothing else runs, {found.hours:.2f}: from steps timed on one "
        "core",
    ]
    lines += [f"left out: {reason}" for reason in left_out]
    return "\n".join(lines)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ConfigError(f"img_per_s must be a positive number, not {text!r}")
    return value


if __name__ == "__main__":
    run_stage(run)
