"""Networks that commute with horizontal mirroring, at half the FLOPs. Importing registers them in timm."""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036  used from a folder, nothing else has checked
    raise ImportError(f"flopeq needs Python 3.11 or newer, and this is {sys.version.split()[0]}")

# A shell that completes a command line wants names, and does not wait for torch.
if "_FLOPEQ_COMPLETE" not in os.environ:
    from flopeq import convnext, resmlp, testing, vit
    from flopeq.convert import convert_authors_state_dict
    from flopeq.malloc import expect_large_blocks, keep_freed_memory
    from flopeq.paper import Table1Row, table1

    expect_large_blocks()

__all__ = [
    "Table1Row", "convert_authors_state_dict", "convnext", "keep_freed_memory", "resmlp", "table1", "testing", "vit",
]  # fmt: skip
