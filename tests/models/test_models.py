"""Every registered model: the law, and timm's contract."""

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import nn

from flopeq.irreps import split
from flopeq.registry import MODELS
from flopeq.testing import assert_equivariant, block_errors, equivariance_error
from tests.models.conftest import (
    EQUIVARIANT,
    EVEN_IMAGE,
    FAMILIES,
    HYBRID,
    IMAGE,
    OURS,
    SMALL,
    random_images,
    small_model,
)

NUM_BLOCKS = 3

# Odd halves of parameters that the even head never reads. The authors' models have them too, and the paper counts
# them. ViT: scale of the final norm; ConvNeXt: weights of the last block's update of odd features.
NEVER_READ = {
    "vit": {"norm.weight odd"},
    "resmlp": set(),
    "convnext_iso": {"blocks.2.mlp.fc2.odd.weight", "blocks.2.gamma odd"},
}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("head", ["even", "even+abs_odd"])
@pytest.mark.parametrize("image", [IMAGE, EVEN_IMAGE], ids=["odd grid", "even grid"])
@pytest.mark.parametrize("name", EQUIVARIANT)
def test_every_e_commutes_with_the_flop(name: str, image: tuple[int, int], head: str) -> None:
    model = small_model(name, image, head=head)
    assert_equivariant(model, random_images(image))
    assert len(block_errors(model, random_images(image))) == NUM_BLOCKS


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EQUIVARIANT if MODELS[name].size in "TS"])
def test_e_commutes_at_the_papers_size(name: str) -> None:
    assert_equivariant(timm.create_model(name).double().eval(), random_images((224, 224)))


@pytest.mark.parametrize("name", HYBRID)
def test_a_hybrid_commutes_up_to_its_split_and_not_beyond(name: str) -> None:
    errors = block_errors(small_model(name, num_flop_blocks=2), random_images())
    assert errors["blocks.0"] < 1e-10 and errors["blocks.1"] < 1e-10
    assert errors["blocks.2"] > 1e-3


@pytest.mark.parametrize("name", [name for name in OURS if MODELS[name].variant == "X"])
def test_no_x_commutes_with_the_flop(name: str) -> None:
    assert equivariance_error(small_model(name), random_images()) > 1e-3
    with pytest.raises(AssertionError, match="logits is off"):
        assert_equivariant(small_model(name), random_images())


def test_the_check_names_a_block_that_was_replaced_by_xs(family: str) -> None:
    e, x = small_model("flop_" + FAMILIES[family]), small_model(FAMILIES[family])
    e.blocks[1] = x.blocks[1]
    with pytest.raises(AssertionError, match=r"blocks\.1 is off"):
        assert_equivariant(e, random_images())


def test_the_check_names_a_block_with_an_odd_bias(family: str) -> None:
    model = small_model("flop_" + FAMILIES[family])
    fc1 = next(module for name, module in model.blocks[1].named_modules() if name.endswith("fc1"))
    if family == "resmlp":
        fc1.register_forward_hook(lambda module, args, parts: parts._replace(oe=parts.oe + 1))
    else:
        fc1.odd.register_forward_hook(lambda module, args, odd: odd + 1)
    with pytest.raises(AssertionError, match=r"blocks\.1 is off"):
        assert_equivariant(model, random_images())


@pytest.mark.parametrize("name", OURS)
def test_every_half_of_every_parameter_learns(name: str) -> None:
    model = small_model(name, head="even") if MODELS[name].variant == "E" else small_model(name)
    model.train()(random_images()).square().sum().backward()
    idle = set()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad, f"{key} is frozen, so it is no parameter"
        channels = parameter.squeeze() if parameter.numel() > 1 else parameter
        halves = {key: parameter.grad}
        if channels.ndim == 1 and len(channels) == model.embed_dim:
            halves = dict(zip((f"{key} even", f"{key} odd"), split(parameter.grad), strict=True))
        idle |= {half for half, grad in halves.items() if not grad.abs().max() > 0}
    expected = NEVER_READ[MODELS[name].family] if MODELS[name].variant == "E" else set()
    assert idle == expected


@pytest.mark.parametrize("name", OURS)
def test_features_heads_and_grids(name: str) -> None:
    model, x = small_model(name), random_images()
    assert model(x).shape == (2, 5)
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x))
    last, grids = model.forward_intermediates(x)
    assert [grid.shape for grid in grids] == [(2, model.num_features, 2, 3)] * NUM_BLOCKS
    torch.testing.assert_close(last, features)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(7)
    assert model.double()(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_unread_features_are_skipped_in_eval_mode_only(name: str) -> None:
    model, x = small_model(name), random_images()
    torch.testing.assert_close(model.train()(x), model.eval()(x))
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)))


@pytest.mark.parametrize("name", OURS)
def test_features_only_gives_image_grids(name: str) -> None:
    args = SMALL[MODELS[name].family] | {"img_size": IMAGE, "patch_size": 8}
    model = timm.create_model(name, features_only=True, out_indices=(0, 2), **args).eval()
    assert [grid.shape for grid in model(random_images().float())] == [(2, 16, 2, 3)] * 2
    assert model.feature_info.reduction() == [8, 8]


@pytest.mark.parametrize("name", OURS)
def test_groups_and_decay_name_real_parameters(name: str) -> None:
    model = small_model(name)
    names = {key for key, _ in model.named_parameters()}
    groups = group_parameters(model, model.group_matcher())
    assert {key for keys in groups.values() for key in keys} == names
    assert len(groups) >= NUM_BLOCKS + 2
    skip = getattr(model, "no_weight_decay", set)()
    kept = {key for key in skip if key in names}
    assert skip - kept <= {"reg_token", "dist_token"}
    assert not kept or kept >= {"cls_token"}
    _, decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=skip)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert not {id(model.get_parameter(key)) for key in kept} & {id(parameter) for parameter in decayed["params"]}


@pytest.mark.parametrize("name", OURS)
def test_checkpointed_blocks_give_the_same_gradients(name: str) -> None:
    model, grads = small_model(name).train(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(random_images()).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", OURS)
def test_inputs_of_other_channels_sizes_and_patches(name: str) -> None:
    args = SMALL[MODELS[name].family]
    model = timm.create_model(name, in_chans=1, img_size=(24, 12), patch_size=(6, 4), num_classes=0, **args).eval()
    assert model(torch.randn(2, 1, 24, 12)).shape == (2, model.head_hidden_size)
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None and cfg.input_size == (3, 224, 224) and cfg.classifier == "head"


@pytest.mark.parametrize("name", HYBRID)
def test_splits_run_from_x_to_e(name: str) -> None:
    baseline = name.removeprefix("flophybrid_")
    e = small_model("flop_" + baseline)
    assert list(small_model(name, num_flop_blocks=3).state_dict()) == list(e.state_dict())
    torch.testing.assert_close(small_model(name, num_flop_blocks=3)(random_images()), e(random_images()))
    if baseline in OURS:
        x = small_model(baseline)
        zero = small_model(name, num_flop_blocks=0)
        assert {k: v.shape for k, v in zero.state_dict().items()} == {k: v.shape for k, v in x.state_dict().items()}
        torch.testing.assert_close(zero(random_images()), x(random_images()))
    counts = [sum(p.numel() for p in small_model(name, num_flop_blocks=k).parameters()) for k in range(4)]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 4
    with pytest.raises(ValueError, match="num_flop_blocks=4 is not valid: use 0"):
        small_model(name, num_flop_blocks=4)


def test_hybrids_default_to_half_of_the_blocks() -> None:
    assert timm.create_model("flophybrid_convnext_iso_small", embed_dim=8).num_flop_blocks == 9


@pytest.mark.parametrize("name", ["flop_deit3_small_patch16_224", "flophybrid_deit3_small_patch16_224"])
def test_a_checkpoint_of_another_resolution_is_resized(name: str, tmp_path) -> None:
    source, path = small_model(name, (16, 32)), tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 5},
        **SMALL["vit"] | {"img_size": (24, 24), "patch_size": 8, "num_classes": 5},
    )
    torch.testing.assert_close(model.pos_embed(), source.pos_embed((3, 3)).float(), atol=1e-6, rtol=1e-5)
    source.set_input_size((24, 24))
    x = random_images((24, 24))
    torch.testing.assert_close(source.eval()(x), model.double().eval()(x), atol=1e-5, rtol=1e-4)
    if name.startswith("flop_"):
        assert_equivariant(source, x, tol=1e-6)


def test_a_vit_takes_images_of_any_size_with_dynamic_img_size() -> None:
    model = small_model("flop_deit3_small_patch16_224", dynamic_img_size=True)
    assert_equivariant(model, random_images((24, 40)), tol=1e-6)  # timm resamples positions in float32


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_a_vit_may_pool_its_tokens(pool: str) -> None:
    assert_equivariant(small_model("flop_deit3_small_patch16_224", global_pool=pool, reg_tokens=2), random_images())


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("flop_deit3_small_patch16_224", {"embed_dim": 15}, "embed_dim is 15"),
        ("flop_deit3_small_patch16_224", {"num_heads": 16}, "multiple of 32"),
        ("flop_deit3_small_patch16_224", {"img_size": (16, 20)}, "width 20"),
        ("flop_deit3_small_patch16_224", {"global_pool": "map"}, "not equivariant"),
        ("flop_deit3_small_patch16_224", {"head": "odd"}, "head='odd' is unknown"),
        ("flophybrid_deit3_small_patch16_224", {"head": "even+abs_odd"}, "no effect"),
        ("flophybrid_resmlp_12_224", {"head": "even+abs_odd", "num_flop_blocks": 0}, "no effect"),
        ("flop_resmlp_12_224", {"embed_dim": 15}, "embed_dim is 15"),
        ("flop_convnext_iso_small", {"embed_dim": 18}, "multiple of 4"),
        ("flop_convnext_iso_small", {"img_size": (16, 20)}, "width 20"),
    ],
)
def test_settings_that_break_equivariance_are_refused(name: str, args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(name, **args)


@pytest.mark.parametrize("name", OURS)
def test_unknown_arguments_raise(name: str) -> None:
    with pytest.raises(TypeError, match="widht"):
        small_model(name, widht=3)


@pytest.mark.parametrize("prefix", ["flop_", "flophybrid_"])
def test_bfloat16_autocast_stays_close(family: str, prefix: str) -> None:
    model, x = small_model(prefix + FAMILIES[family]).float(), random_images().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    expected = model(x)
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("prefix", "num_blocks"), [("flop_", 1), ("flophybrid_", 2)])
def test_compiled_without_graph_breaks_equals_eager(family: str, prefix: str, num_blocks: int) -> None:
    """Uses two blocks, so that a hybrid has one block of each kind."""
    depth = "num_blocks" if family == "resmlp" else "depth"
    model, x = small_model(prefix + FAMILIES[family], **{depth: num_blocks}).float(), random_images().float()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x).float(), model(x).float(), atol=0.1, rtol=0.1)
