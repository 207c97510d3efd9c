"""The tensors of somebody else's checkpoint, each of which a conversion takes once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Tensors = dict[str, Tensor]


class TensorSource:
    """The authors' tensors. The conversion takes each tensor once; tensors that remain are unknown."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self.left = {_strip_wrappers(name): tensor for name, tensor in state_dict.items()}
        blocks = [name.split(".")[1] for name in self.left if name.startswith("blocks.")]
        self.depth = 1 + max((int(index) for index in blocks if index.isdecimal()), default=-1)

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        """Removes and returns the tensor with this name in the authors' code."""
        if name not in self.left:
            raise ValueError(f"the checkpoint lacks {name!r}: it is truncated, or not one of the authors'")
        return self.left.pop(name)

    def drop_zeros(self, name: str) -> None:
        """Drops a tensor that the authors keep at zero and that flopeq's model does not have."""
        if self.take(name).any():
            raise ValueError(f"{name!r} is frozen at zero in the authors' code, but not in this checkpoint")

    def check_empty(self) -> None:
        """Raises ValueError if tensors remain."""
        if self.left:
            some = ", ".join(sorted(self.left)[:5]) + (", ..." if len(self.left) > 5 else "")
            raise ValueError(f"{len(self.left)} tensors of the checkpoint have no place in the model: {some}")


def _strip_wrappers(name: str) -> str:
    """A tensor's name without the prefixes of torch.compile and DistributedDataParallel."""
    while name.startswith(("_orig_mod.", "module.")):
        name = name.partition(".")[2]
    return name


def convert_linear(source: TensorSource, old: str, new: str) -> Tensors:
    """Converts weight and bias of an ordinary layer."""
    return {f"{new}.{part}": source.take(f"{old}.{part}") for part in ("weight", "bias")}


def convert_vit_block(source: TensorSource, name: str) -> Tensors:
    """Converts an ordinary block of a ViT."""
    block = {f"{name}.ls{index}.gamma": source.take(f"{name}.gamma_{index}") for index in (1, 2)}
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        block |= convert_linear(source, f"{name}.{layer}", f"{name}.{layer}")
    return block
