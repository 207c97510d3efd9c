"""`make plan`: what every run would take, with nothing started: `python -m stages.plan [images/s of one GPU]`."""

from __future__ import annotations

from pipeline import config
from pipeline.config import ConfigError
from stages import main


def run(img_per_s: str | None = None) -> None:
    """Raises: ConfigError for a throughput that is no positive number."""
    experiment = config.load()
    rate = None if img_per_s is None else _positive(img_per_s)
    import rich.box
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from pipeline import plan

    console = Console()
    grid = Table(box=rich.box.SIMPLE_HEAD)
    grid.add_column("run", no_wrap=True)
    for column in ("steps", "images/\nworker", "params\nM", "GFLOPs", "GPU-\nhours", "state\nGiB", "disk\nGiB"):
        grid.add_column(column, justify="right", vertical="bottom")
    rows = track(plan.plan(experiment, img_per_s=rate), "counting", total=len(experiment.models), transient=True,
                 console=Console(stderr=True), disable=not console.is_terminal)
    total = 0.0
    for row in rows:
        hours = "?" if row.gpu_hours is None else f"{row.gpu_hours:,.0f}"
        total += row.gpu_hours or 0
        grid.add_row(row.run, f"{row.steps:,}", f"{row.images_per_worker:,}", f"{row.params_m:.1f}",
                     f"{row.gflops:.1f}", hours, f"{row.state_gib:.1f}", f"{row.disk_gib:.1f}")
    console.print(grid)
    source = (f"{rate:,.0f} images/s of training on one GPU, as given" if rate else
              "a third of the paper's forward throughput on an A100, ? where it has none: expect more")
    console.print(f"GPU-hours, {total:,.0f} in all: from {source}.\nState: weights, gradients, optimizer and average; "
                  "activations come on top. Disk: checkpoints and final weights, without shards.")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ConfigError(f"img_per_s must be a positive number, not {text!r}")
    return value


if __name__ == "__main__":
    main(run)
