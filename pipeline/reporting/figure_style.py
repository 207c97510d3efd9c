"""What all figures of the report share: colors of families, markers of variants, and the legend of both."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.reporting.run_results import RunResult

# Okabe and Ito's palette, distinguishable with every common color blindness.
COLORS = {"vit": "#0072B2", "resmlp": "#D55E00", "convnext_iso": "#009E73", None: "#666666"}

FAMILIES = {"vit": "ViT", "resmlp": "ResMLP", "convnext_iso": "ConvNeXt (iso.)", None: "other"}

MARKERS = {
    "X": "o",
    "E": "^",
    "H": "s",
    "C2xC2": "P",
    "H-C2xC2": "p",
    "D4": "*",
    "H-D4": "h",
    "graded": "v",
    "S": "X",
    None: "D",
}

DASHES = {
    "X": "-",
    "E": (0, (4, 1.5)),
    "H": (0, (1, 1.2)),
    "C2xC2": (0, (6, 1.5, 1, 1.5)),
    "H-C2xC2": (0, (1, 2.4)),
    "D4": (0, (6, 1.5, 1, 1.5, 1, 1.5)),
    "H-D4": (0, (1, 3.6)),
    "graded": (0, (4, 1.5, 1, 1.5, 1, 1.5, 1, 1.5)),
    "S": (0, (3, 1, 1, 1)),
    None: "-.",
}

VARIANTS = {
    "X": "X, baseline",
    "E": "E(X), equivariant",
    "H": "H(X), hybrid",
    "C2xC2": "C2xC2(X), flop and flip",
    "H-C2xC2": "H-C2xC2(X), its hybrid",
    "D4": "D4(X), octic",
    "H-D4": "H-D4(X), its hybrid",
    "graded": "graded, groups by depth",
    "S": "S(X), symmetrized",
    None: "other",
}


def add_legend(figure: Figure, results: Sequence[RunResult]) -> None:
    """Adds a legend with families in the first row and variants in the second."""
    families = [family for family in COLORS if any(r.family == family for r in results)]
    variants = [variant for variant in MARKERS if any(r.variant == variant for r in results)]
    first = [Line2D([], [], color=COLORS[family], lw=5, label=FAMILIES[family]) for family in families]
    second = [
        Line2D([], [], color="#444444", marker=MARKERS[variant], ls="", label=VARIANTS[variant]) for variant in variants
    ]
    blank = Line2D([], [], ls="", label=" ")
    pairs = zip_longest(first, second, fillvalue=blank)  # a legend is filled column by column
    figure.legend(
        handles=[handle for pair in pairs for handle in pair],
        loc="outside lower center",
        ncols=max(len(first), len(second)),
        fontsize=8.5,
        handlelength=1.2,
        columnspacing=1.2,
    )


def mark_empty(axes: Axes) -> None:
    """Writes into axes that have no data that nothing was measured."""
    where = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, "nothing measured", color="#777777", **where)
    axes.set(xticks=[], yticks=[])
