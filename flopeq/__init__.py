"""Networks that commute with horizontal mirroring, at half the FLOPs. Importing registers them in timm."""

from flopeq import vit

__all__ = ["vit"]
