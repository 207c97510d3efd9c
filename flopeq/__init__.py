"""Networks that commute with horizontal mirroring, at half the FLOPs. Importing registers them in timm."""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036  without an installation, nothing else checks it
    raise ImportError(f"flopeq needs Python 3.11 or newer, and this is {sys.version.split()[0]}")

# Shell completion needs only the names of models and commands, so it skips the import of torch.
if "_FLOPEQ_COMPLETE" not in os.environ:
    from flopeq import testing
    from flopeq.backends.malloc import keep_freed_memory, raise_trim_threshold
    from flopeq.hub.convert import convert_authors_state_dict
    from flopeq.measure.paper import Table1Row, table1
    from flopeq.models import convnext, group_convnext, group_resmlp, group_vit, resmlp, vit

    raise_trim_threshold()

__all__ = [
    "Table1Row", "convert_authors_state_dict", "convnext", "group_convnext", "group_resmlp", "group_vit",
    "keep_freed_memory", "resmlp", "table1", "testing", "vit",
]  # fmt: skip
