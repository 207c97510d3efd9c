"""Numbers and lists as text."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_flops(value: float) -> str:
    """Formats FLOPs with a decimal prefix and three significant digits."""
    for factor, prefix in _UNITS:
        if value >= factor:
            return f"{value / factor:.3g} {prefix}FLOPs"
    return f"{value:.3g} FLOPs"


def format_number(value: float) -> str:
    """Formats a number with three significant digits, and as an integer from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def signed(value: float) -> str:
    """Formats a difference with its sign and two significant digits."""
    return f"{value:+.2g}"


def percent(value: float) -> str:
    """Formats a share as a percentage without decimals."""
    return f"{100 * value:.0f}%"


def join_words(words: Sequence[str]) -> str:
    """Joins words as in a sentence: `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
