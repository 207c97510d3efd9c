"""The application with which commands register, and its error reporting."""

from __future__ import annotations

import logging
import sys

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Image networks that commute with horizontal mirroring, at half the FLOPs.",
    epilog="Every command has --help, with examples, and --json. Exit codes: 0 success; 2 invalid input, "
    "reported in one line on stderr; 130 interrupted.",
)  # fmt: skip


def format_examples(*lines: str) -> str:
    return "\n".join(("Examples:\n", *(f"- flopeq {line}" for line in lines)))


def main(words: list[str] | None = None) -> None:
    """Runs one command. Reports invalid input in one line on stderr, with exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        app(args=words)
    except (ValueError, OSError) as error:
        exit_with_error(error)
    except RuntimeError as error:
        from flopeq.measure.throughput import ModelOutOfMemoryError

        if not isinstance(error, ModelOutOfMemoryError):
            raise
        exit_with_error(error)


def exit_with_error(error: Exception) -> None:
    """Prints the error in one line on stderr and exits with code 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
