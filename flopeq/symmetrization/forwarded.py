"""What a symmetrized network takes over from the timm model inside it, with the prefix `model.` before names."""

from __future__ import annotations

import re
from typing import Any, cast

from torch import Tensor, nn

PREFIX = "model."

_START = re.compile(r"(?<![\[\\])\^")
"""The anchor ^ in a pattern, but neither an escaped one nor the ^ of a negated set."""


def _of_model(name: str) -> Any:
    """A property with the value of the network's attribute; missing if the network has none."""
    return property(lambda self: getattr(self.model, name), doc=f"`{name}` of the network.")


class TimmModel(nn.Module):
    """A module around `model` that has the attributes and methods of timm's models as far as `model` has them."""

    num_classes = _of_model("num_classes")
    num_features = _of_model("num_features")
    head_hidden_size = _of_model("head_hidden_size")
    in_chans = _of_model("in_chans")
    feature_info = _of_model("feature_info")
    global_pool = _of_model("global_pool")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        if hasattr(model, "pretrained_cfg"):
            self.pretrained_cfg = self.default_cfg = prefixed_config(cast("Any", model).pretrained_cfg)

    @property
    def timm_model(self) -> Any:
        """The network, as one with timm's methods."""
        return self.model

    @property
    def innermost(self) -> nn.Module:
        """The network, or the network inside it if it is symmetrized itself."""
        return self.model.innermost if isinstance(self.model, TimmModel) else self.model

    def record_arguments(self, **arguments: Any) -> None:
        """Keeps the arguments from which `timm.create_model("symmetrized", ...)` builds this network again."""
        cfg = getattr(self, "pretrained_cfg", None)
        if cfg:
            made_of = {name: value for name, value in arguments.items() if value != "invariant"}
            self._model_args = {"model": cfg["architecture"], **made_of, **getattr(self.model, "_model_args", {})}
            cfg["architecture"] = "symmetrized"

    @property
    def _traits(self) -> dict[str, Any]:
        return prefixed_config(getattr(self.model, "_traits", {}))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The network's head, on features that `forward_features` has combined.

        It gives the logits of `forward` if the head is affine after pooling, as that of a ViT with a class token. If
        it is not, for example where a LayerNorm follows the pooling, it gives other invariant logits.
        """
        return self.timm_model.forward_head(features, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        return self.timm_model.get_classifier()

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Replaces the network's classifier, as its own method does."""
        self.timm_model.reset_classifier(num_classes, *args, **kwargs)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Changes the image size of the network, as its own method does."""
        self.timm_model.set_input_size(*args, **kwargs)
        self._model_args = {**getattr(self, "_model_args", {}), **getattr(self.model, "_model_args", {})}

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """Removes what the selected intermediate features do not need, as the network's own method does."""
        return self.timm_model.prune_intermediate_layers(*args, **kwargs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.timm_model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        skipped = self.timm_model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {PREFIX + name for name in skipped}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The network's groups of parameters, for learning rates by layer."""
        return {name: _prefixed_pattern(spec) for name, spec in self.timm_model.group_matcher(coarse=coarse).items()}


def prefixed_config(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration of timm, in which modules have the names that they have in the symmetrized network."""
    named = {name: _prefixed(config[name]) for name in ("first_conv", "classifier") if config.get(name)}
    return {**config, **named}


def _prefixed(names: str | list[str] | tuple[str, ...]) -> str | tuple[str, ...]:
    return PREFIX + names if isinstance(names, str) else tuple(PREFIX + name for name in names)


def _prefixed_pattern(spec: Any) -> Any:
    if isinstance(spec, str):
        return f"^{re.escape(PREFIX)}(?:{_START.sub('', spec)})"
    if isinstance(spec, list | tuple):
        return [(_prefixed_pattern(pattern), suffix) for pattern, suffix in spec]
    return spec
