"""Renders a model card: description, metrics, training, usage, intended use and license of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from flopeq.measure.comparison import flopeq_version
from flopeq.measure.paper import strip_size, table1
from flopeq.models.variants import baseline_name
from flopeq.registry import ModelInfo, describe

Formatter = Callable[[float], str]

BIBTEX = """@inproceedings{bokman2025flopping,
  title     = {Flopping for {FLOPs}: Leveraging Equivariance for Computational Efficiency},
  author    = {B{\\"o}kman, Georg and Nordstr{\\"o}m, David and Kahl, Fredrik},
  booktitle = {International Conference on Machine Learning},
  year      = {2025}
}"""

FAMILIES = {"vit": "vision transformer (DeiT III)", "resmlp": "ResMLP", "convnext_iso": "isotropic ConvNeXt"}

_COPIES = {
    "E": "its mirror image",
    "C2xC2": "its mirrored copies",
    "D4": "its mirrored or turned copies",
    "graded": "its copies under the group of its last block",
}
"""What the logits do not distinguish from an image, by variant."""

FLOAT64_ERROR = "equivariance/float64_error"
"""Prefix of the metrics of `flopeq.hub.export.measure_equivariance_errors`; a symmetry's name follows."""

_PERCENT, _RATIO, _ERROR = "{:.1f} %".format, "{:.2f}".format, "{:.1e}".format

_POINTS = "{:+.2f} points".format

_REACHED: dict[str, tuple[str, Formatter]] = {
    "val/top1_pct": ("top-1", _PERCENT),
    "val/top5_pct": ("top-5", _PERCENT),
    "val/ema_top1_pct": ("top-1 of the averaged weights", _PERCENT),
    "val/real_top1_pct": ("top-1 on the ReaL labels", _PERCENT),
    "val/loss": ("loss", "{:.4g}".format),
    "val/flop_agreement_pct": ("same answer for an image and its flop", _PERCENT),
    "equivariance/max_rel_error": ("equivariance error of the logits", _ERROR),
}


@dataclass(frozen=True)
class TrainedRun:
    """The files of a training run of the pipeline, in outputs/<run>/."""

    config: Mapping[str, Any]
    """Content of config.yaml: run, model, args, seed, data, recipe, train."""
    metrics: Mapping[str, Any]
    """Content of metrics.json; empty before `evaluate`."""
    notes: Mapping[str, Any]
    """Content of run.json: status, reason of a divergence, best epoch, fingerprint, MLflow run, compiled or not."""
    failure: str | None
    """Why the run did not converge; None if it converged or was not evaluated."""


def failure_reason(notes: Mapping[str, Any], metrics: Mapping[str, Any]) -> str | None:
    """Why a run did not converge, from its run.json and metrics.json; None if it converged or was not evaluated."""
    if notes.get("status") == "diverged":
        reason = (notes.get("message") or "non-finite loss").partition(";")[0]  # the ids of the images follow
        return f"it diverged ({reason}); shown is its best epoch before"
    if metrics.get("converged", True):
        return None
    top1 = metrics.get("val/top1_pct")
    is_known = top1 is not None and math.isfinite(top1)
    return f"its training ended at {top1:.1f}% top-1" if is_known else "it has no validation accuracy"


def render_card(
    name: str,
    args: Mapping[str, Any],
    size: tuple[int, int, int],
    metrics: Mapping[str, float | None],
    *,
    weights: str,
    license: str = "apache-2.0",
    conditions: str = "",
    run: TrainedRun | None = None,
    run_folder: Path | None = None,
) -> str:
    """Renders the model card in Markdown, with the front matter of model hubs. It leaves out metrics without a value.

    Args:
        metrics: measured values of the network, under the names of the report's metrics.json, and
            `equivariance/float64_error/<symmetry>` from `flopeq.hub.export.measure_equivariance_errors`.
        weights: origin of the weights.
        conditions: conditions of the throughput measurement.
        run_folder: folder of a run that is not exported yet, for which the card shows the `flopeq export` command;
            None if the card is part of an exported folder.
    """
    symmetrize = run.config.get("symmetrize") if run else None
    info = describe(name, args, symmetrized=symmetrize is not None)
    title = info.paper_name if info else f"S({name})" if symmetrize else name
    if info and not _has_paper_size(args):  # E(ViT), not E(ViT-S)
        title = strip_size(title)
    if run:
        title = f"{run.config['run']}: {title}"
    parts = [
        _front_matter(license, run),
        f"# {title}",
        _description(name, args, symmetrize),
        *([f"**It did not converge: {run.failure}.**"] if run and run.failure else []),
        "## Figures",
        _metrics_table(name, args, size, metrics, weights, conditions, run),
        *(_training_section(run) if run else ()),
        "## Use",
        _usage_section(run_folder, symmetrize),
        "## Intended use",
        _intended_use_section(name, args, run, symmetrize),
        "## Source and licence",
        _license_section(license),
        f"```bibtex\n{BIBTEX}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(license: str, run: TrainedRun | None) -> str:
    tags = ["image-classification", "timm", "equivariance", "flopeq"]
    lines = ["---", "library_name: timm", "pipeline_tag: image-classification", f"license: {license}"]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    if run:
        lines += ["datasets:", f"- {run.config['data']['name']}"]
    return "\n".join([*lines, "---"])


def _description(name: str, args: Mapping[str, Any], symmetrize: Mapping[str, str] | None) -> str:
    info = describe(name)
    if symmetrize:
        source, group, how = (symmetrize[key] for key in ("weights_of", "group", "how"))
        text = (
            f"The network of the run `{source}` with its weights, made invariant under the group `{group}` by "
            f"`flopeq.symmetrize` (how: {how}), without training. The logits of an image and of its transformed images "
            "are the same."
        )
    elif info is None:
        return f"`{name}` of timm."
    else:
        text = _variant_description(info, args)
    given = ", ".join(f"{key}={value!r}" for key, value in args.items())
    return f"{text}\n\nModel `{name}`{f' with {given}' if given else ''}, registered in timm by the package flopeq."


def _variant_description(info: ModelInfo, args: Mapping[str, Any]) -> str:
    kind = FAMILIES[info.family]
    if "symmetry" in args:
        return (
            f"A {kind} whose blocks commute with groups of symmetries of the square, {args['symmetry']!r} from the "
            "first block to the last. Its logits are invariant under the last block's group, but not after ordinary "
            "blocks (x, or blocks that are not named)."
        )
    if args.get("octic_vits") == "invariant":
        return (
            f"An octic {kind}: its first blocks are equivariant to the eight symmetries of the square, and the "
            "ordinary blocks after them see features that no symmetry changes. The logits of an image and of its "
            "mirrored and turned copies are the same by construction."
        )
    return {
        "X": f"An ordinary {kind}, the baseline of the networks that are equivariant to horizontal mirroring.",
        "E": f"A {kind} that is equivariant to horizontal mirroring (a *flop*): its features are an even half, which a "
        "flop leaves alone, and an odd half, which it negates. Linear layers are block diagonal and cost half, and the "
        "logits of an image and of its flop are the same by construction.",
        "H": f"A hybrid {kind}: its first blocks are equivariant to horizontal mirroring, at half the cost of their "
        "linear layers, and the others are ordinary. Its logits are not invariant.",
        "C2xC2": f"A {kind} that is equivariant to horizontal and vertical mirroring: its features have four parts, "
        "one for each pair of signs. Linear layers are block diagonal and cost a quarter, and the logits of an image "
        "and of its mirror images are the same by construction.",
        "H-C2xC2": f"A hybrid {kind}: its first blocks are equivariant to horizontal and vertical mirroring, at a "
        "quarter of the cost of their linear layers, and the others are ordinary. Its logits are not invariant.",
        "D4": f"An octic {kind}: it is equivariant to the eight symmetries of the square, mirroring and quarter turns. "
        "Linear layers are block diagonal and cost 3/16, and the logits of an image and of its mirrored and turned "
        "copies are the same by construction.",
        "H-D4": f"A hybrid octic {kind}: its first blocks are equivariant to the eight symmetries of the square, at "
        "3/16 of the cost of their linear layers, and the others are ordinary. Its logits are not invariant.",
    }[info.variant]


def _metrics_table(
    name: str,
    args: Mapping[str, Any],
    size: tuple[int, int, int],
    metrics: Mapping[str, float | None],
    weights: str,
    conditions: str,
    run: TrainedRun | None,
) -> str:
    figures: dict[str, tuple[str, Formatter]] = {
        "complexity/params_m": ("parameters", lambda millions: _format_count(1e6 * millions)),
        "complexity/gflops": (
            "FLOPs an image (the paper's convention)",
            lambda billions: _format_count(1e9 * billions),
        ),
        "complexity/gmacs": ("multiply-adds an image", lambda billions: _format_count(1e9 * billions)),
        "complexity/flop_ratio": (f"FLOPs of X, `{baseline_name(name)}`, over these", _RATIO),
        "perf/forward_img_per_s": (f"images/s forward ({conditions})", "{:,.0f}".format),
        "perf/throughput_ratio": ("images/s over those of X", _RATIO),
        **{
            key: (f"equivariance error of the logits under the {g}, float64, two random images", _ERROR)
            for key in metrics
            if (g := key.removeprefix(f"{FLOAT64_ERROR}/")) != key
        },
        "difference/to_x_pct": ("top-1 minus that of X, same images", _POINTS),
        "difference/to_x_mcnemar_p": ("McNemar's exact test of that difference, p", format_p),
        "difference/to_symmetrized_pct": ("top-1 minus that of S(X), same images", _POINTS),
        "difference/to_symmetrized_mcnemar_p": ("McNemar's exact test of that difference, p", format_p),
        "difference/to_own_recipe_pct": ("top-1 minus that before its recipe was tuned, same images", _POINTS),
        "difference/to_own_recipe_mcnemar_p": ("McNemar's exact test of that difference, p", format_p),
        "seeds/num": ("seeds of this network", "{:.0f}".format),
        "seeds/top1_pct": ("mean top-1 of its seeds", _PERCENT),
        "seeds/to_x_pct": ("that mean minus the mean of X's seeds", _POINTS),
        "seeds/to_symmetrized_pct": ("that mean minus the mean of S(X)'s seeds", _POINTS),
        "seeds/to_own_recipe_pct": ("that mean minus the mean before tuning", _POINTS),
    }
    rows = [("weights", weights), ("image", " x ".join(map(str, size))), *_format_available(metrics, figures)]
    is_symmetrized = run is not None and "symmetrize" in run.config
    paper = next((row for row in table1() if row.model == name and not is_symmetrized), None)
    if paper and _has_paper_size(args) and size[1:] == (224, 224):
        top1 = "diverged" if paper.top1 is None else f"{paper.top1} %"
        rows.append(("the paper's network of this name, ImageNet-1K top-1 (its weights, not these)", top1))
    return _table("", rows)


def _training_section(run: TrainedRun) -> list[str]:
    """Data, recipe and validation metrics of a run."""
    data, recipe, train = run.config["data"], run.config["recipe"], run.config["train"]
    further = {f"{name}/top1_pct": (f"top-1 on {name}, never trained or chosen on", _PERCENT)
               for name in data["further_val"]}  # fmt: skip
    reached = _format_available(run.metrics, _REACHED | further)
    mean, std = (", ".join(map(str, data[key])) for key in ("mean", "std"))
    epoch = run.notes.get("best_epoch")
    cores = "1 CPU core" if train["cpus_per_worker"] == 1 else f"{train['cpus_per_worker']} CPU cores"
    workers = train["workers"] if isinstance(train["workers"], int) else " to ".join(map(str, train["workers"]))
    facts = [
        f"- Data: {data['name']}, images of {data['image_size']} x {data['image_size']}, normalized with mean {mean} "
        f"and deviation {std}, validated on its own validation split.",
        f"- Recipe `{recipe['name']}`, seed {run.config['seed']}"
        + ("." if epoch is None else f"; the weights are those of epoch {epoch}, the best by validation top-1."),
        f"- Workers: {workers}, of {cores} each; mixed precision {train['amp']}, "
        f"{'compiled' if run.notes.get('compiled', train['compile']) else 'eager'}.",
    ]
    if run.notes.get("mlflow_run_id"):
        facts.append(f"- Run `{run.config['run']}`: MLflow {run.notes['mlflow_run_id']}, "
                     f"configuration {run.notes.get('fingerprint', 'unknown')}.")  # fmt: skip
    settings = [(key, "off" if value is None else str(value)) for key, value in recipe.items() if key != "name"]
    return [
        "## Training",
        "\n".join(facts),
        _table("validation", reached) if reached else "Not evaluated.",
        f"<details><summary>The recipe</summary>\n\n{_table('', settings)}\n\n</details>",
    ]


def _usage_section(run_folder: Path | None, symmetrize: Mapping[str, str] | None) -> str:
    folder = f"exported/{run_folder.name}" if run_folder else "<this folder>"
    export = ""
    if run_folder:
        command = f"flopeq export --run {run_folder} {folder}"
        if symmetrize:
            trained = run_folder.parent / symmetrize["weights_of"]
            options = f"--group {symmetrize['group']!r} --how {symmetrize['how']}"
            command = f"flopeq symmetrize --run {trained} {options} {folder}"
        export = f"```console\n$ {command}\n```\n\n"
    return (
        f"{export}```python\nimport flopeq, timm  # importing flopeq registers the model in timm\n\n"
        f'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n```"
    )


def _intended_use_section(
    name: str, args: Mapping[str, Any], run: TrainedRun | None, symmetrize: Mapping[str, str] | None
) -> str:
    classes = f"the classes of {run.config['data']['name']}" if run else "the classes it is trained on"
    validated = " It was validated only on the images named here." if run else ""
    info = describe(name, args)
    copies = _COPIES.get("D4" if args.get("octic_vits") == "invariant" else info.variant) if info else None
    if symmetrize:
        copies = f"what the group `{symmetrize['group']}` makes of it"
    mirrored = "" if copies is None else (
        f" It cannot tell an image from {copies}: do not use it where that matters (text, signs, left and right "
        "organs)."
    )  # fmt: skip
    return (
        f"Meant for research on image classification: to classify images into {classes}, to be compared with networks "
        "that treat mirroring differently, to be fine-tuned, or as a backbone (`forward_features`, "
        f"`features_only=True`).{mirrored}{validated} It has not been examined for safety or bias. Do not base "
        "decisions about people on it."
    )


def _license_section(license: str) -> str:
    return (
        f"The weights are licensed as `{license}`; rights in the data that they were trained on are not affected. The "
        "code is flopeq's, Apache-2.0, after the networks of Bökman, Nordström and Kahl, *Flopping for FLOPs* (ICML "
        "2025, [arXiv 2502.05169](https://arxiv.org/abs/2502.05169); their code, Apache-2.0: "
        "[georg-bn/flopping-for-flops](https://github.com/georg-bn/flopping-for-flops)).\n\n"
        f"Written by flopeq {flopeq_version()} with torch {torch.__version__.partition('+')[0]} and timm "
        f"{timm.__version__}."
    )


def _has_paper_size(args: Mapping[str, Any]) -> bool:
    """Whether a model with these arguments has the paper's width, depth and number of equivariant blocks."""
    return not set(args) - {"num_classes", "img_size", "drop_path_rate", "checkpoint_path"}


def _format_available(
    metrics: Mapping[str, Any], figures: Mapping[str, tuple[str, Formatter]]
) -> list[tuple[str, str]]:
    """Label and formatted value of each metric that is present and finite, with its interval if it has one."""
    rows = []
    for key, (label, formatter) in figures.items():
        value = metrics.get(key)
        if value is None or not math.isfinite(value):
            continue
        low, high = (metrics.get(key.removesuffix("_pct") + f"_{side}_pct") for side in ("low", "high"))
        if low is None or high is None:
            rows.append((label, formatter(value)))
        else:
            rows.append((label, f"{formatter(value)} (95% interval {_number(low, formatter)} to "
                                f"{_number(high, formatter)})"))  # fmt: skip
    return rows


def format_p(p: float) -> str:
    """Formats a p-value."""
    return f"{p:.2g}" if p >= 0.001 else "<0.001"


def _number(value: float, formatter: Formatter) -> str:
    """The formatted value without its unit."""
    return formatter(value).partition(" ")[0]


def _table(head: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"| {head} | |" if head else "| | |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)])


def _format_count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"
