"""Compares X, S(X) and E(X) on transformed images, and three designs for several images, on Fashion-MNIST.

    python -m benchmarks.symmetrization                                  both experiments, in OUT
    python -m benchmarks.symmetrization --outputs DIR/outputs --parts robustness

It needs the trained runs of `make repro PRESET=fashion` in --outputs. An interrupted run resumes: predicted classes
that OUT has are not computed again. The accuracies do not depend on what else the machine does; the times do.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import robustness, symmetrization_figures, symmetrization_tables, view_classification
from flopeq.backends.malloc import keep_freed_memory
from flopeq.hardware import hardware_name
from flopeq.measure.comparison import flopeq_version

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

PARTS = ("robustness", "views", "costs")


def main() -> None:
    """Runs the parts, and writes their rows as CSV, tables as Markdown and figures as PNG."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the folder of the trained runs")
    parser.add_argument("--data", type=Path, default=FASHION_MNIST, help="the folder of the IDX files")
    parser.add_argument("--out", type=Path, default=Path(f"results/symmetrize-{today}"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--robustness", type=json.loads, default={}, help="settings to change, as JSON")
    parser.add_argument("--views", type=json.loads, default={}, help="settings to change, as JSON")
    parser.add_argument("--timed-passes", type=int, default=7)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    settings = (robustness.Settings(**args.robustness), view_classification.Settings(**args.views))
    try:
        if "robustness" in args.parts:
            write_csv(args.out / "robustness.csv",
                      robustness.measure_robustness(args.outputs, args.data, args.out, settings[0]))  # fmt: skip
        if "views" in args.parts:
            write_csv(args.out / "views.csv",
                      view_classification.measure_accuracy(args.outputs, args.data, args.out, settings[1]))  # fmt: skip
        if "costs" in args.parts:
            write_csv(args.out / "view_costs.csv",
                      view_classification.measure_cost(args.outputs, runs=args.timed_passes))  # fmt: skip
    except ValueError as error:  # no runs, no images, results of other settings
        sys.exit(f"error: {error}")
    describe_run(args.out / "run.json", args.parts, {"robustness": settings[0], "views": settings[1]})
    (args.out / "tables.md").write_text(symmetrization_tables.render_tables(args.out), encoding="utf-8")
    symmetrization_figures.draw_figures(args.out)
    logging.info("the tables are in %s", args.out / "tables.md")


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Writes dataclasses as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(row) for row in rows)


def describe_measurement(module: str) -> dict[str, Any]:
    """Returns when and where this process measures, and with which versions and command."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "machine": hardware_name("cpu"),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "timm", "numpy")} | {"flopeq": flopeq_version()},
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
    }


def describe_run(path: Path, parts: Sequence[str], settings: dict[str, Any]) -> None:
    """Writes when, where and with which versions and command each part was measured."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    entry = describe_measurement("benchmarks.symmetrization")
    for part in parts:
        known[part] = entry | ({"settings": settings[part]._asdict()} if part in settings else {})
    path.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
