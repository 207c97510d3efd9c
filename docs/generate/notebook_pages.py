"""Notebooks, run and written as Markdown: text, code, what it printed, and its pictures within the page."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import nbclient
import nbformat
from links import ROOT

FOLDER = ROOT / "notebooks"


@functools.cache
def page(path: Path, content: str) -> str:
    """Runs a notebook, whose text is `content`, and returns its page. Raises: nbclient's error where a cell does."""
    notebook = nbformat.reads(content, as_version=4)
    # The kernel is a process of its own: it finds the repository's packages, and draws without a screen.
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    client = nbclient.NotebookClient(notebook, timeout=600, startup_timeout=180, kernel_name="python3")
    client.create_kernel_manager()
    with tempfile.TemporaryDirectory() as sockets:  # no port of this machine
        client.km.transport, client.km.ip = "ipc", f"{sockets}/kernel"
        client.execute(cwd=str(FOLDER), env=surroundings)
    parts = [_cell(cell) for cell in notebook.cells]
    parts.insert(1, f"*The notebook notebooks/{path.name}, as it ran when this site was built.*")
    return "\n\n".join(parts) + "\n"


def _cell(cell: nbformat.NotebookNode) -> str:
    if cell.cell_type == "markdown":
        return cell.source
    outputs = []
    for output in cell.outputs:
        if output.get("name") == "stderr":  # warnings about the machine that builds the site
            continue
        if outputs and output.output_type == outputs[-1].output_type == "stream":
            outputs[-1].text += output.text  # the kernel sends what is printed in pieces
        else:
            outputs.append(output)
    return "\n\n".join([f"```python\n{cell.source}\n```", *map(_output, outputs)])


def _output(output: nbformat.NotebookNode) -> str:
    if output.output_type == "stream":
        return f"```text\n{output.text.rstrip()}\n```"
    if "image/png" in output.data:
        return f"![What the cell draws](data:image/png;base64,{output.data['image/png'].strip()})"
    return f"```text\n{output.data['text/plain']}\n```"
