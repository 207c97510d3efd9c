"""Networks that commute with horizontal mirroring, at half the FLOPs. Importing registers them in timm."""

from flopeq import convnext, resmlp, testing, vit
from flopeq.convert import convert_authors_state_dict
from flopeq.paper import Table1Row, table1

__all__ = ["Table1Row", "convert_authors_state_dict", "convnext", "resmlp", "table1", "testing", "vit"]
