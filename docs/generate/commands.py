"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

import typer.main
from typer.cli import get_docs_for_click

from flopeq.cli.app import app


def page() -> str:
    """The whole page, in Markdown."""
    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="flopeq", title="The command line")
