"""Refits a study from its runs, in seconds and without torch."""

from __future__ import annotations

from pathlib import Path

from pipeline.base.files import write_json
from pipeline.scaling.figures import draw_figures
from pipeline.scaling.findings import make_findings
from pipeline.scaling.fits import analyze
from pipeline.scaling.fits_file import to_json
from pipeline.scaling.runs import load_study


def refit(folder: Path) -> None:
    """Fits the runs of a study's folder and writes fits.json, findings.json and figures/ into it.

    Reads runs.csv, losses.parquet and study.json. The same files give the same output, to the last digit.

    Raises: ConfigError: if a file is missing, or files do not belong together.
    """
    analysis = analyze(load_study(folder))
    fits = to_json(analysis)
    write_json(folder / "fits.json", fits)
    write_json(folder / "findings.json", make_findings(analysis))
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    drawn = draw_figures(fits)
    for stale in [*figures.glob("scaling_*.png"), *figures.glob("scaling_*.csv")]:
        stale.unlink()
    for figure in drawn:
        (figures / f"{figure.name}.png").write_bytes(figure.png)
        (figures / f"{figure.name}.csv").write_text(figure.csv, encoding="utf-8")
