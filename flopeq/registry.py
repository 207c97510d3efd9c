"""The models of the study: paper name, family, size and variant of each name in timm's registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class ModelInfo:
    """A model of the study.

    `variant` is X (baseline), E or H (equivariant or hybrid, for the flop), or the same for a larger group: C2xC2 or
    H-C2xC2, D4 or H-D4. S is X symmetrized. A network whose argument `symmetry` gives every block its group is graded.
    """

    model: str
    paper_name: str
    family: str
    size: str
    variant: str

    @property
    def group(self) -> str | None:
        """The name of the group in `flopeq.groups`, or None for X, S and graded networks."""
        return _GROUPS[self.variant]

    @property
    def hybrid(self) -> bool:
        """Whether only the first blocks are equivariant, unless arguments say otherwise."""
        return self.variant.startswith("H")


BASELINES = (
    ("deit3_small_patch16_224", "ViT-S", "vit", "S"),
    ("deit3_base_patch16_224", "ViT-B", "vit", "B"),
    ("deit3_large_patch16_224", "ViT-L", "vit", "L"),
    ("deit3_huge_patch14_224", "ViT-H", "vit", "H"),
    ("resmlp_12_224", "ResMLP-T12", "resmlp", "T"),
    ("resmlp_24_224", "ResMLP-S24", "resmlp", "S"),
    ("resmlp_base_24_224", "ResMLP-B24", "resmlp", "B"),
    ("resmlp_large_24_224", "ResMLP-L24", "resmlp", "L"),
    ("convnext_iso_small", "ConvNeXt-S (iso.)", "convnext_iso", "S"),
    ("convnext_iso_base", "ConvNeXt-B (iso.)", "convnext_iso", "B"),
    ("convnext_iso_large", "ConvNeXt-L (iso.)", "convnext_iso", "L"),
)

PREFIXES = {
    "X": "",
    "E": "flop_",
    "H": "flophybrid_",
    "C2xC2": "mirrors_",
    "H-C2xC2": "mirrorshybrid_",
    "D4": "octic_",
    "H-D4": "octichybrid_",
}

GROUP_VARIANTS = ("C2xC2", "H-C2xC2", "D4", "H-D4")
"""Variants for groups beyond that of the flop."""

ARGS_OF_SYMMETRY = ("num_flop_blocks", "num_group_blocks", "symmetry", "head", "octic_vits")
"""Arguments that X does not have."""

_GROUPS = {
    "X": None, "S": None, "graded": None, "E": "c2", "H": "c2", "C2xC2": "c2xc2", "H-C2xC2": "c2xc2", "D4": "d4",
    "H-D4": "d4",
}  # fmt: skip

MODELS: dict[str, ModelInfo] = {
    prefix + name: ModelInfo(prefix + name, paper if variant == "X" else f"{variant}({paper})", family, size, variant)
    for name, paper, family, size in BASELINES
    for variant, prefix in PREFIXES.items()
}


def describe(
    model: str, args: Mapping[str, Any] = MappingProxyType({}), *, symmetrized: bool = False
) -> ModelInfo | None:
    """The model of the study with this name and these arguments, or None for a model outside the study.

    With the argument `symmetry` the network is graded, and its paper name has the groups: "d4:4,c2:8(ViT-S)". If
    `symmetrized`, it is S(X): the model, averaged over a group of symmetries (`flopeq.symmetrize`).
    """
    info = MODELS.get(model)
    if info is None:
        return None
    if symmetry := args.get("symmetry"):
        baseline = MODELS[model.removeprefix(PREFIXES[info.variant])]
        info = replace(info, paper_name=f"{symmetry}({baseline.paper_name})", variant="graded")
    return replace(info, paper_name=f"S({info.paper_name})", variant="S") if symmetrized else info
