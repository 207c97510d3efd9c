"""`timm.create_model("symmetrized", model=..., group=...)`, which also loads exported folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict_from_hf, register_model
from timm.models._hub import load_state_dict_from_path
from torch import Tensor

from flopeq.symmetrization.forwarded import PREFIX
from flopeq.symmetrization.reductions import How
from flopeq.symmetrization.wrapper import Symmetrized


@register_model
def symmetrized(
    pretrained: bool = False,
    *,
    model: str,
    group: str = "flop",
    how: How = "average",
    batched: bool = True,
    pretrained_cfg: Any = None,
    **kwargs: Any,
) -> Symmetrized:
    """timm's `model`, symmetrized; other arguments go to it. Pretrained weights are those of `model` or of a folder.

    A folder, "local-dir:..." or "hf-hub:...", holds the weights of the symmetrized network.
    """
    other_weights: dict[str, Tensor] = {}
    if isinstance(pretrained_cfg, dict) and pretrained_cfg.get("source"):
        pretrained_cfg = _config_of_model(pretrained_cfg, model)
        if pretrained:
            weights = _load_weights(pretrained_cfg)
            pretrained_cfg["state_dict"] = {
                name.removeprefix(PREFIX): weights.pop(name) for name in [*weights] if name.startswith(PREFIX)
            }
            other_weights = weights
        del pretrained_cfg["source"]
    network: Any = timm.create_model(model, pretrained, pretrained_cfg, **kwargs)
    network.pretrained_cfg.pop("state_dict", None)  # the network has these weights now
    result = Symmetrized(network, group, how, batched=batched)
    if other_weights:
        result.load_state_dict({**result.state_dict(), **other_weights})
    return result


def _config_of_model(config: dict[str, Any], model: str) -> dict[str, Any]:
    """The configuration of a folder with the names of the network itself."""
    names = {key: config[key] for key in ("first_conv", "classifier") if config.get(key)}
    named = {
        key: value.removeprefix(PREFIX) if isinstance(value, str) else [name.removeprefix(PREFIX) for name in value]
        for key, value in names.items()
    }
    return {**config, **named, "architecture": model}


def _load_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    if config["source"] == "hf-hub":
        return load_state_dict_from_hf(config["hf_hub_id"], weights_only=True)
    return load_state_dict_from_path(Path(config["file"]))
