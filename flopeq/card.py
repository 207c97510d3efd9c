"""A model's folder for timm: safetensors, config.json, and a model card whose figures are measured on the spot."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import load_checkpoint, save_for_hf
from torch import nn

from flopeq.build import build
from flopeq.comparison import flopeq_version
from flopeq.flops import Complexity, complexity
from flopeq.paper import table1
from flopeq.registry import describe
from flopeq.testing import equivariance_error
from flopeq.variants import baseline_of

PAPER = """@inproceedings{bokman2025flopping,
  title     = {Flopping for {FLOPs}: Leveraging Equivariance for Computational Efficiency},
  author    = {B{\\"o}kman, Georg and Nordstr{\\"o}m, David and Kahl, Fredrik},
  booktitle = {International Conference on Machine Learning},
  year      = {2025}
}"""

FAMILIES = {"vit": "vision transformer (DeiT III)", "resmlp": "ResMLP", "convnext_iso": "isotropic ConvNeXt"}
METRICS = {
    "val/top1_pct": "top-1 (%)",
    "val/top5_pct": "top-5 (%)",
    "val/ema_top1_pct": "top-1 of the averaged weights (%)",
    "val/real_top1_pct": "top-1 on the ReaL labels (%)",
    "val/loss": "loss",
    "val/flop_agreement_pct": "same answer for an image and its flop (%)",
}


@dataclass(frozen=True)
class TrainedRun:
    """What a training of the pipeline left in outputs/<run>/, as plain files."""

    folder: Path
    config: dict[str, Any]
    """config.yaml: model, args, data, recipe, seed."""
    metrics: dict[str, Any]
    """metrics.json; empty before `evaluate`."""
    notes: dict[str, Any]
    """run.json: status, best epoch, fingerprint, MLflow's run."""

    @property
    def weights(self) -> Path:
        """The best weights."""
        return self.folder / "weights.safetensors"


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, and measured."""

    model: str
    folder: str
    params: int
    flops: int
    equivariance_error: float


def read_run(folder: Path) -> TrainedRun:
    """A run's files. Raises: ValueError for a folder that is none of a trained run."""
    import yaml  # timm requires it

    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no trained run: it has no config.yaml, as outputs/<run> has")
    read = {}
    for name in ("metrics.json", "run.json"):
        path = folder / name
        read[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return TrainedRun(folder, config, read["metrics.json"], read["run.json"])


def export(
    name: str | None,
    folder: Path,
    *,
    checkpoint: Path | None = None,
    run: Path | None = None,
    license: str = "apache-2.0",
    **args: Any,
) -> Exported:
    """Writes a model into a folder in timm's hub layout: model.safetensors, config.json and the card, README.md.

    `run` is a trained run's folder, which says model, arguments, weights and preprocessing; `checkpoint` a file of
    weights, safetensors or torch's. Without either the weights are random. Arguments that the checkpoint shows (those
    that `flopeq convert` notes, and the number of classes) need not be given.
    Raises: ValueError for a model, arguments or weights that do not fit each other.
    """
    trained = None if run is None else read_run(run)
    if trained:
        if name not in (None, trained.config["model"]):
            raise ValueError(f"{trained.folder} is a run of {trained.config['model']}, not of {name}")
        name, args = trained.config["model"], trained.config["args"] | args
        checkpoint = checkpoint or trained.weights
    assert name is not None
    if checkpoint:
        args = _shown_by(checkpoint, name) | args
    torch.manual_seed(0)
    model = build(name, **args).eval()
    if checkpoint:
        _load(model, name, checkpoint)
    data = None
    if trained:
        used = trained.config["data"]
        data = {"input_size": (3, used["image_size"], used["image_size"]), "mean": tuple(used["mean"]),
                "std": tuple(used["std"]), "interpolation": used["interpolation"],
                "crop_pct": trained.config["recipe"]["test_crop_ratio"]}  # fmt: skip
    try:
        save_for_hf(model, str(folder), safe_serialization=True, data_config=data,
                    model_config={"pretrained_cfg": {"license": license}})  # fmt: skip
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error}") from error
    size = tuple(json.loads((folder / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]["input_size"])
    counted = complexity(build(name, device="meta", **args), size)
    error = measured_error(model, size)
    weights = f"those of `{checkpoint.name}`" if checkpoint else "random, untrained"
    text = card(name, args, size, counted, error, weights=weights, license=license, run=trained)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return Exported(name, str(folder), counted.params, counted.flops, error)


def measured_error(model: nn.Module, size: tuple[int, int, int], seed: int = 0) -> float:
    """The largest difference between logits of two random images and of their flops, relative, in float64."""
    generator = torch.Generator().manual_seed(seed)
    images_BCHW = torch.randn(2, *size, generator=generator, dtype=torch.float64)
    return equivariance_error(copy.deepcopy(model).cpu().double().eval(), images_BCHW)


def card(
    name: str,
    args: dict[str, Any],
    size: tuple[int, int, int],
    counted: Complexity,
    error: float,
    *,
    weights: str,
    license: str = "apache-2.0",
    run: TrainedRun | None = None,
) -> str:
    """The model card, Markdown with the front matter that model hubs read.

    `error` is `measured_error`; `weights` says where they come from. A figure that nobody measured is not there.
    """
    info = describe(name)
    title = info.paper_name if info else name
    if info and not _is_the_papers(args):  # E(ViT), not E(ViT-S)
        title = re.sub(r"-[TSBLH]\d*\b", "", title)
    if run:
        title = f"{run.config['run']}: {title}"
    parts = [
        _front_matter(license, run),
        f"# {title}",
        _what(name, args),
        "## Figures",
        _figures(name, args, size, counted, error, weights),
        *(_training(run) if run else ()),
        "## Use",
        "```python\nimport flopeq, timm  # importing flopeq registers the model in timm\n\n"
        'model = timm.create_model("local-dir:<this folder>", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n```",
        _intended(name, run),
        "## Source and licence",
        _source(license),
        f"```bibtex\n{PAPER}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(license: str, run: TrainedRun | None) -> str:
    tags = ["image-classification", "timm", "equivariance", "flopeq"]
    lines = ["---", "library_name: timm", "pipeline_tag: image-classification", f"license: {license}"]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    if run:
        lines += ["datasets:", f"- {run.config['data']['name']}"]
    return "\n".join([*lines, "---"])


def _what(name: str, args: dict[str, Any]) -> str:
    info = describe(name)
    if info is None:
        return f"`{name}` of timm."
    kind = FAMILIES[info.family]
    text = {
        "X": f"An ordinary {kind}, the baseline of the networks that are equivariant to horizontal mirroring.",
        "E": f"A {kind} that is equivariant to horizontal mirroring (a *flop*): its features are an even half, which a "
        "flop leaves alone, and an odd half, which it negates. Linear layers are block diagonal and cost half, and the "
        "logits of an image and of its flop are the same by construction.",
        "H": f"A hybrid {kind}: its first blocks are equivariant to horizontal mirroring, at half the cost of their "
        "linear layers, and the others are ordinary. Its logits are not invariant.",
    }[info.variant]
    given = ", ".join(f"{key}={value!r}" for key, value in args.items())
    return f"{text}\n\nModel `{name}`{f' with {given}' if given else ''}, registered in timm by the package flopeq."


def _figures(
    name: str, args: dict[str, Any], size: tuple[int, int, int], counted: Complexity, error: float, weights: str
) -> str:
    rows = [
        ("weights", weights),
        ("image", " x ".join(map(str, size))),
        ("parameters", _count(counted.params)),
        ("FLOPs an image (the paper's convention)", _count(counted.flops)),
        ("multiply-adds an image", _count(counted.macs)),
    ]
    info = describe(name)
    if info and info.variant != "X":
        ours = {key: value for key, value in args.items() if key not in ("num_flop_blocks", "head")}
        baseline = baseline_of(name)
        if not (info.family == "resmlp" and "resmlp_base" not in name and "resmlp_large" not in name and ours):
            x = complexity(build(baseline, device="meta", **ours), size)
            rows.append((f"FLOPs of X, `{baseline}`, over these", f"{x.flops / counted.flops:.2f}"))
    rows.append(("equivariance error of the logits, float64, two random images", f"{error:.1e}"))
    paper = next((row for row in table1() if row.model == name), None)
    if paper and _is_the_papers(args) and size[1:] == (224, 224):
        top1 = "diverged" if paper.top1 is None else f"{paper.top1} %"
        rows.append(("the paper's network of this name, ImageNet-1K top-1 (its weights, not these)", top1))
    lines = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"| | |\n| --- | --- |\n{lines}"


def _training(run: TrainedRun) -> list[str]:
    """Data, recipe and what was reached, as the run's files say."""
    data, recipe = run.config["data"], run.config["recipe"]
    measured = [(shown, run.metrics[key]) for key, shown in METRICS.items() if run.metrics.get(key) is not None]
    reached = "\n".join(f"| {shown} | {value:.4g} |" for shown, value in measured)
    converged = run.metrics.get("converged", run.notes.get("status") == "finished")
    warning = "" if converged else "**This training did not converge.**\n\n"
    epoch = run.notes.get("best_epoch")
    facts = [
        f"- Data: {data['name']}, images of {data['image_size']} x {data['image_size']}, validated on its own "
        "validation split.",
        f"- Recipe `{recipe['name']}`, seed {run.config['seed']}"
        + ("." if epoch is None else f"; the weights are those of epoch {epoch}, the best by validation top-1."),
    ]
    if run.notes.get("mlflow_run_id"):
        facts.append(f"- Run `{run.config['run']}`: MLflow {run.notes['mlflow_run_id']}, "
                     f"configuration {run.notes.get('fingerprint', 'unknown')}.")  # fmt: skip
    settings = "\n".join(f"| {key} | {_setting(value)} |" for key, value in recipe.items() if key != "name")
    return [
        "## Training",
        "\n".join(facts),
        f"{warning}| validation | |\n| --- | --- |\n{reached}" if reached else f"{warning}Not evaluated.",
        f"<details><summary>The recipe</summary>\n\n| | |\n| --- | --- |\n{settings}\n\n</details>",
    ]


def _intended(name: str, run: TrainedRun | None) -> str:
    classes = f"the classes of {run.config['data']['name']}" if run else "the classes it is trained on"
    info = describe(name)
    mirrored = (
        " It cannot tell an image from its mirror image: do not use it where that matters (text, signs, left and "
        "right organs)."
        if info and info.variant == "E"
        else ""
    )
    return (
        f"Meant for research on image classification: to classify images into {classes}, to be fine-tuned, or as a "
        f"backbone (`forward_features`, `features_only=True`).{mirrored} Nobody has examined it for safety or bias, "
        "and decisions about people need more than it gives."
    )


def _source(license: str) -> str:
    return (
        f"The weights are licensed as `{license}`; rights in the data that they were trained on are not affected. The "
        "code is flopeq's, Apache-2.0, after the networks of Bökman, Nordström and Kahl, *Flopping for FLOPs* (ICML "
        "2025, [arXiv 2502.05169](https://arxiv.org/abs/2502.05169); their code, Apache-2.0: "
        "[georg-bn/flopping-for-flops](https://github.com/georg-bn/flopping-for-flops)).\n\n"
        f"Written by flopeq {flopeq_version()} with torch {torch.__version__.partition('+')[0]} and timm "
        f"{timm.__version__}."
    )


def _is_the_papers(args: dict[str, Any]) -> bool:
    """Whether a model of these arguments has the paper's width, depth and split."""
    return not set(args) - {"num_classes", "img_size", "drop_path_rate", "checkpoint_path"}


def _count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def _setting(value: Any) -> str:
    return "off" if value is None else str(value)


def _shown_by(checkpoint: Path, name: str) -> dict[str, Any]:
    """Arguments that a file of weights shows: those noted by `flopeq convert`, else the number of classes."""
    if not checkpoint.is_file():
        raise ValueError(f"there is no {checkpoint}")
    if checkpoint.suffix != ".safetensors":
        return {}
    try:
        with safe_open(checkpoint, framework="pt") as file:
            noted = file.metadata() or {}
            head = [file.get_slice(key).get_shape() for key in file.keys() if key == "head.weight"]  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{checkpoint} is no safetensors file, or it is damaged: {error}") from error
    if noted.get("model", name) != name:
        raise ValueError(f"{checkpoint} holds weights of {noted['model']}, not of {name}")
    if "model_args" in noted:
        return json.loads(noted["model_args"])
    return {"num_classes": head[0][0]} if head else {}


def _load(model: nn.Module, name: str, checkpoint: Path) -> None:
    try:
        load_checkpoint(model, str(checkpoint), strict=True)
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise ValueError(f"{checkpoint} does not fit {name}: {first}") from error
