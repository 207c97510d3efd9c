"""Compares two states: `python -m stages.compare THEN [NOW]`, each a revision, an experiment or a folder.

Without NOW, THEN is compared with the workspace. The page is reports/comparison.html.
"""

from __future__ import annotations

import logging

from stages import run_stage


def run(then: str = "HEAD", now: str | None = None) -> None:
    """Raises: CompareError for a state that does not exist or has no metrics."""
    import rich.box
    from rich.console import Console
    from rich.table import Table as Grid

    from pipeline.reporting import revision_diff

    before, after = revision_diff.load_revision(then), revision_diff.load_revision(now)
    table = Grid("run", "", box=rich.box.SIMPLE_HEAD)
    for name in (before.name, after.name, "change"):
        table.add_column(name, justify="right")
    differences = revision_diff.find_differences(before, after)
    for difference in differences:
        change = "" if difference.change is None else f"{difference.change:+,.4g}"
        sides = (revision_diff.format_value(side) for side in (difference.before, difference.after))
        table.add_row(difference.run, difference.name, *sides, change)
    Console().print(table if differences else f"nothing differs between {before.name} and {after.name}")
    logging.info("side by side: %s", revision_diff.write_comparison(before, after))


if __name__ == "__main__":
    run_stage(run)
