"""What changed since a revision: `python -m stages.compare THEN [NOW]`, each a revision, an experiment or a folder.

Without NOW it is compared with the workspace. The page is reports/comparison.html.
"""

from __future__ import annotations

import logging

from stages import main


def run(then: str = "HEAD", now: str | None = None) -> None:
    """Raises: CompareError for what does not exist, or has no metrics."""
    import rich.box
    from rich.console import Console
    from rich.table import Table as Grid

    from pipeline import compare

    before, after = compare.read(then), compare.read(now)
    grid = Grid("run", "", box=rich.box.SIMPLE_HEAD)
    for name in (before.name, after.name, "change"):
        grid.add_column(name, justify="right")
    found = compare.differences(before, after)
    for difference in found:
        change = "" if difference.change is None else f"{difference.change:+,.4g}"
        sides = (compare.shown(side) for side in (difference.then, difference.now))
        grid.add_row(difference.of, difference.name, *sides, change)
    Console().print(grid if found else f"nothing differs between {before.name} and {after.name}")
    logging.info("side by side: %s", compare.write(before, after))


if __name__ == "__main__":
    main(run)
