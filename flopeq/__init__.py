"""Networks that commute with horizontal mirroring, at half the FLOPs. Importing registers them in timm."""

from flopeq import convnext, resmlp, vit

__all__ = ["convnext", "resmlp", "vit"]
