"""Networks for groups beyond the flop: the law for every symmetry, grades, heads, and timm's contract."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.models import create_feature_extractor, group_parameters
from torch import nn

from flopeq.groups import GROUPS, TRIVIAL
from flopeq.measure.flops import complexity
from flopeq.models.build import build
from flopeq.models.symmetry import format_symmetry, parse_symmetry
from flopeq.registry import GROUP_VARIANTS, MODELS, PREFIXES
from flopeq.testing import assert_equivariant, block_errors, equivariance_error, feature_groups
from tests.models.conftest import (
    EVEN_SQUARE,
    FAMILIES,
    GROUP_CASES,
    GROUP_MODELS,
    SMALL,
    SQUARE,
    random_images,
    small_group_model,
    small_model,
)

cases = pytest.mark.parametrize("case", GROUP_CASES)

TOP = {"c2": ("c2",), "c2xc2": ("c2", "c2xc2"), "d4": ("c2", "c2xc2", "d4")}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_timm_lists_every_size(family: str) -> None:
    sizes = [name for name, info in MODELS.items() if info.family == family and info.variant == "X"]
    for variant in GROUP_VARIANTS:
        found = set(timm.list_models(f"{PREFIXES[variant]}*"))
        assert {PREFIXES[variant] + name for name in sizes} <= found
    assert MODELS["octic_deit3_small_patch16_224"].paper_name == "D4(ViT-S)"
    assert MODELS["mirrorshybrid_deit3_small_patch16_224"].paper_name == "H-C2xC2(ViT-S)"


@pytest.mark.parametrize("head", ["trivial", "power"])
@pytest.mark.parametrize("image", [SQUARE, EVEN_SQUARE], ids=["odd grid", "even grid"])
@cases
def test_every_block_and_the_logits_keep_their_groups(case: str, image: tuple[int, int], head: str) -> None:
    groups = GROUP_CASES[case][2]
    model, x = small_group_model(case, image, **{} if groups[-1] == "trivial" else {"head": head}), random_images(image)
    assert [group.name for group in feature_groups(model)] == list(groups)
    for name in TOP[groups[0]]:
        errors = block_errors(model, x, name)
        for index, block_group in enumerate(groups):
            kept = block_group != "trivial" and name in TOP[block_group]
            assert (errors[f"blocks.{index}"] < 1e-10) == kept, f"{name} at block {index}: {errors}"
            assert kept or errors[f"blocks.{index}"] > 1e-3
        kept = groups[-1] != "trivial" and name in TOP[groups[-1]]
        error = equivariance_error(model, x, name)
        assert error < 1e-10 if kept else error > 1e-4, name


@cases
def test_the_flops_own_check_passes_unless_blocks_are_ordinary(case: str) -> None:
    model, x = small_group_model(case), random_images(SQUARE)
    if GROUP_CASES[case][2][-1] == "trivial":
        with pytest.raises(AssertionError, match="does not commute with the flop"):
            assert_equivariant(model, x)
    else:
        assert_equivariant(model, x)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_check_for_a_larger_group_fails_for_x_and_e(family: str) -> None:
    x = random_images(SQUARE)
    for prefix, broken in (("", "logits"), ("flop_", "logits")):
        with pytest.raises(AssertionError, match=f"{broken} is off"):
            assert_equivariant(small_model(prefix + FAMILIES[family], SQUARE), x, group="d4")
    with pytest.raises(AssertionError, match="commute with the quarter turn"):
        assert_equivariant(small_model("mirrors_" + FAMILIES[family], SQUARE), x, group="c4")


@pytest.mark.parametrize("irrep", ["a2", "b1", "b2", "e"])
def test_the_check_names_a_block_with_one_wrong_sign(irrep: str) -> None:
    model, x = small_group_model("d4 vit"), random_images(SQUARE)
    assert_equivariant(model, x, group="d4")
    layer = model.blocks[1].mlp.fc1.get_submodule(irrep)
    layer.register_forward_hook(lambda module, args, result: result.abs())
    with pytest.raises(AssertionError, match=r"blocks\.1 is off"):
        assert_equivariant(model, x, group="d4")


def test_images_that_are_not_square_are_refused_by_what_transposes_only() -> None:
    image = (16, 24)
    model, x = small_group_model("c2xc2 vit", image), random_images(image)
    assert_equivariant(model, x, group="c2xc2")
    with pytest.raises(ValueError, match="16 x 24 pixels are not square"):
        assert_equivariant(model, x, group="d4")
    with pytest.raises(ValueError, match="image size 16 x 24 is not square"):
        small_group_model("d4 vit", image)


@cases
def test_every_part_of_every_parameter_learns(case: str) -> None:
    model = small_group_model(case).train()
    model(random_images(SQUARE)).square().sum().backward()
    idle = {key for key, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0}
    # E(ConvNeXt)'s last block has an update of odd features, which the even head does not read.
    assert idle == ({"blocks.2.mlp.fc2.odd.weight"} if case == "graded convnext_iso" else set())
    assert all(parameter.requires_grad for parameter in model.parameters())


@cases
def test_features_heads_and_grids(case: str) -> None:
    model, x = small_group_model(case), random_images(SQUARE)
    last_group = GROUPS[GROUP_CASES[case][2][-1]]
    width = {"trivial": 16, "c2": 8, "c2xc2": 16, "d4": 12}[last_group.name]
    assert model(x).shape == (2, 5) and model.head_hidden_size == width
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (2, width)
    torch.testing.assert_close(model.forward_head(features), model(x))
    last, grids = model.forward_intermediates(x)
    assert [grid.shape for grid in grids] == [(2, 16, 5, 5)] * 3
    torch.testing.assert_close(last, features)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(7)
    assert model.double()(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, width)
    torch.testing.assert_close(model.train()(x), model.eval()(x))


@pytest.mark.parametrize(("head", "width"), [("trivial", 2), ("power", 12)])
def test_the_power_head_has_the_norms_of_all_irreps(head: str, width: int) -> None:
    model = small_group_model("d4 vit", head=head)
    x = torch.randn(3, 16, dtype=torch.float64)
    a1, a2, b1, b2, e = GROUPS["d4"].split(x)
    expected = a1 if head == "trivial" else torch.cat((a1, a2.abs(), b1.abs(), b2.abs(), e.square().sum(-2).sqrt()), -1)
    assert model.head_hidden_size == width == expected.shape[-1]
    torch.testing.assert_close(model.invariants(x), expected)
    torch.testing.assert_close(model.invariants(x.T, dim=0), expected.T)


def test_the_power_heads_gradient_is_finite_for_an_image_that_all_symmetries_leave_alone() -> None:
    model = small_group_model("d4 vit").train()
    model(torch.ones(2, 3, *SQUARE, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_tokens_may_be_pooled(pool: str) -> None:
    model = small_group_model("d4 vit", global_pool=pool, reg_tokens=2)
    assert_equivariant(model, random_images(SQUARE), group="d4")


@cases
def test_features_only_groups_and_decay(case: str) -> None:
    name, args, _ = GROUP_CASES[case]
    sizes = SMALL[MODELS[name].family] | {"img_size": SQUARE, "patch_size": 8} | args
    features = timm.create_model(name, features_only=True, out_indices=(0, 2), **sizes).eval()
    assert [grid.shape for grid in features(random_images(SQUARE).float())] == [(2, 16, 5, 5)] * 2
    model = small_group_model(case)
    names = {key for key, _ in model.named_parameters()}
    groups = group_parameters(model, model.group_matcher())
    assert {key for keys in groups.values() for key in keys} == names and len(groups) >= 5
    first = GROUPS[GROUP_CASES[case][2][0]]
    if MODELS[name].family == "vit":
        assert model.no_weight_decay() - names == {"reg_token"}
        assert {f"pos_embed.{irrep.name}" for irrep in first.irreps} <= model.no_weight_decay()


@cases
def test_checkpointed_blocks_give_the_same_gradients(case: str) -> None:
    model, grads = small_group_model(case).train(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(random_images(SQUARE)).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
@cases
def test_a_copy_computes_the_same(case: str, duplicate) -> None:
    model, x = small_group_model(case), random_images(SQUARE)
    assert torch.equal(duplicate(model)(x), model(x))


@cases
def test_fx_extracts_features(case: str) -> None:
    model, x, seen = small_group_model(case), random_images(SQUARE), []
    extracted = create_feature_extractor(model, ["blocks.1", "head"])(x)
    torch.testing.assert_close(extracted["head"], model(x))
    model.blocks[1].register_forward_hook(lambda module, args, result: seen.append(result))
    model.forward_features(x)
    torch.testing.assert_close(extracted["blocks.1"], seen[0])


@pytest.mark.parametrize("case", [case for case in GROUP_CASES if case.startswith("graded")])
def test_exported_programs_compute_the_same(case: str) -> None:
    model, x = small_group_model(case), random_images(SQUARE)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


@cases
def test_a_checkpoint_of_other_sizes_and_channels_is_adapted(case: str, tmp_path) -> None:
    name, args, groups = GROUP_CASES[case]
    source, path = small_group_model(case, (32, 32)).float(), str(tmp_path / "weights.pth")
    torch.save(source.state_dict(), path)
    image, patch_size = ((18, 18), 6) if MODELS[name].family == "vit" else ((32, 32), 8)
    sizes = SMALL[MODELS[name].family] | {"img_size": image, "patch_size": patch_size, "num_classes": 5, "in_chans": 1}
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": path, "num_classes": 5}, **sizes | args
    ).eval()
    if patch_size != 8:
        source.set_input_size(image, patch_size=patch_size)
    x = random_images(image, channels=1).float()
    torch.testing.assert_close(model(x), source(x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    assert max(block_errors(model, x, groups[-1]).values()) < 1e-3 or groups[-1] == "trivial"


def test_any_square_image_with_dynamic_img_size() -> None:
    model = small_group_model("d4 vit", dynamic_img_size=True)
    assert_equivariant(model, random_images((48, 48)), tol=1e-6, group="d4")  # timm resamples in float32
    with pytest.raises(ValueError, match="image size 48 x 24 is not square"):
        model(random_images((48, 24)))


@cases
def test_a_model_from_the_meta_device_is_initialized(case: str) -> None:
    name, args, groups = GROUP_CASES[case]
    sizes = SMALL[MODELS[name].family] | {"img_size": SQUARE, "patch_size": 8} | args
    fresh = timm.create_model(name, **sizes).state_dict()
    with torch.device("meta"):
        model = timm.create_model(name, **sizes)
    model.to_empty(device="cpu").init_weights()
    for key, found in model.state_dict().items():
        if found.numel() < 10:
            assert found.isfinite().all(), key
        elif fresh[key].min() == fresh[key].max():
            assert torch.equal(found, fresh[key]), key
        else:
            assert 0.2 < found.square().mean().sqrt() / fresh[key].square().mean().sqrt() < 5, key
    x = random_images(SQUARE)
    errors = block_errors(model.double().eval(), x, groups[0])
    assert errors["blocks.0"] < 1e-10


@pytest.mark.parametrize(
    ("symmetry", "names"),
    [
        ("d4:4,c2:8", ["d4"] * 4 + ["c2"] * 8),
        ("d4:4, c2", ["d4"] * 4 + ["c2"] * 8),
        ("d4:6", ["d4"] * 6 + ["trivial"] * 6),
        ("d4", ["d4"] * 12),
        ("d4:2,c2xc2:3,c2:4,x", ["d4"] * 2 + ["c2xc2"] * 3 + ["c2"] * 4 + ["trivial"] * 3),
        ("x", ["trivial"] * 12),
    ],
)
def test_symmetry_names_the_group_of_each_block(symmetry: str, names: list[str]) -> None:
    groups = parse_symmetry(symmetry, 12)
    assert [group.name for group in groups] == names
    assert parse_symmetry(format_symmetry(groups), 12) == groups


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"symmetry": "c4:2"}, "'c4' is unknown, use x, c2, c2xc2, d4"),
        ({"symmetry": "d4,c2:1"}, "say how many blocks d4 has"),
        ({"symmetry": "d4:0"}, "'0' is not a number of blocks"),
        ({"symmetry": "d4:4"}, "names 4 blocks, but the depth is 3"),
        ({"symmetry": "c2:1,d4:1"}, "d4 cannot follow c2"),
        ({"symmetry": "x:1,c2"}, "c2 cannot follow trivial"),
        ({"symmetry": "d4", "num_group_blocks": 2}, "no effect beside symmetry"),
        ({"num_group_blocks": 4}, "num_group_blocks=4 is not valid"),
        ({"embed_dim": 12}, "embed_dim is 12, .* 8 equal parts"),
        ({"num_heads": 4}, "multiple of 32"),
        ({"img_size": (40, 32)}, "not square"),
        ({"patch_size": (8, 4)}, "not square"),
        ({"head": "even"}, "head='even' is unknown"),
        ({"symmetry": "d4:2", "head": "power"}, "no effect after ordinary blocks"),
        ({"global_pool": "map"}, "not equivariant"),
        ({"no_embed_class": False}, "class token"),
        ({"norm_layer": "layernorm"}, "norm_layer"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad"),
    ],
)
def test_settings_that_break_equivariance_are_refused(args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_group_model("d4 vit", **args)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_networks_without_a_larger_group_are_x_e_and_h(family: str) -> None:
    x, octic = random_images(SQUARE), "octic_" + FAMILIES[family]
    for symmetry, other, args in (
        ("x", FAMILIES[family], {}),
        ("c2", "flop_" + FAMILIES[family], {}),
        ("c2:2", "flophybrid_" + FAMILIES[family], {"num_flop_blocks": 2}),
    ):
        ours, theirs = small_model(octic, SQUARE, symmetry=symmetry), small_model(other, SQUARE, **args)
        assert type(ours) is type(theirs)
        assert torch.equal(ours(x), theirs(x))
    assert small_model(octic, SQUARE, num_group_blocks=0)(x).equal(small_model(FAMILIES[family], SQUARE)(x))


@pytest.mark.parametrize("name", GROUP_MODELS)
def test_default_cfgs_and_parameters(name: str) -> None:
    cfg, model = timm.get_pretrained_cfg(name).to_dict(), build(name, device="meta")
    assert model.get_submodule(cfg["first_conv"]).group.name == MODELS[name].group
    assert isinstance(model.get_submodule(cfg["classifier"]), nn.Linear)
    assert cfg["input_size"] == (3, 224, 224) and cfg["num_classes"] == 1000
    groups = feature_groups(model)
    assert groups.count(TRIVIAL) == (len(groups) // 2 if MODELS[name].hybrid else 0)


@pytest.mark.slow
@cases
def test_traced_without_graph_breaks_equals_eager(case: str) -> None:
    assert_compiled_equals_eager(small_group_model(case), backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "args"),
    [
        ("d4 vit", {"depth": 1}),
        ("d4 resmlp", {"num_blocks": 1}),
        ("c2xc2 resmlp", {"num_blocks": 1}),
        ("d4 convnext_iso", {"depth": 1}),
        ("graded vit", {}),
    ],
)
def test_compiled_equals_eager(case: str, args: dict) -> None:
    """Of few networks: code generation takes much longer than tracing."""
    assert_compiled_equals_eager(small_group_model(case, **args), backend="inductor")


def assert_compiled_equals_eager(model: nn.Module, backend: str) -> None:
    model, x = model.float(), random_images(SQUARE).float()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x).float(), model(x).float(), atol=0.1, rtol=0.1)


# FLOPs of X over those of the network: equivariant, and the hybrid of half the blocks (docs/maths.md).
RATIOS = {
    "deit3_small_patch16_224": {"c2xc2": (3.01, 1.50), "d4": (3.60, 1.56)},
    "deit3_base_patch16_224": {"c2xc2": (3.41, 1.55), "d4": (4.25, 1.62)},
    "deit3_large_patch16_224": {"c2xc2": (3.55, 1.56), "d4": (4.51, 1.64)},
    "deit3_huge_patch14_224": {"c2xc2": (3.57, 1.56), "d4": (4.54, 1.64)},
    "resmlp_12_224": {"c2xc2": (3.48, 1.57), "d4": (4.36, 1.65)},
    "resmlp_24_224": {"c2xc2": (3.60, 1.57), "d4": (4.50, 1.65)},
    "resmlp_base_24_224": {"c2xc2": (3.78, 1.58), "d4": (4.90, 1.66)},
    "resmlp_large_24_224": {"c2xc2": (3.86, 1.59), "d4": (5.00, 1.67)},
    "convnext_iso_small": {"c2xc2": (3.43, 1.55), "d4": (4.3, 1.62)},
    "convnext_iso_base": {"c2xc2": (3.69, 1.57), "d4": (4.7, 1.65)},
    "convnext_iso_large": {"c2xc2": (3.79, 1.58), "d4": (4.9, 1.66)},
}


@pytest.mark.parametrize("baseline", RATIOS)
def test_flop_ratios(baseline: str) -> None:
    names = [name for name in GROUP_MODELS if name.endswith(f"_{baseline}")]
    assert len(names) == len(GROUP_VARIANTS)
    of_baseline = flops_at_full_depth(baseline)
    for name in names:
        info = MODELS[name]
        expected = RATIOS[baseline][info.group][info.hybrid]
        assert of_baseline / flops_at_full_depth(name) == pytest.approx(expected, rel=0.03), name


def test_flops_at_full_depth_are_those_of_the_whole_network() -> None:
    name = "octichybrid_deit3_small_patch16_224"
    assert flops_at_full_depth(name) == complexity(build(name, device="meta"), (3, 224, 224)).flops


def flops_at_full_depth(name: str) -> int:
    """FLOPs of a network, extrapolated from those of its two and four middle blocks: a quarter of the time to count."""
    model = build(name, device="meta")
    blocks, middle = model.blocks, len(model.blocks) // 2
    counted = []
    for reach in (1, 2):
        model.blocks = blocks[middle - reach : middle + reach]
        counted.append(complexity(model, (3, 224, 224)).flops)
    return counted[0] + (counted[1] - counted[0]) * (len(blocks) - 2) // 2
