"""What timm and its users expect of a model holds for a symmetrized one: modes, names, sizes, counts, and tools."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import flopeq
from flopeq.measure.flops import complexity
from flopeq.square import FLOP, symmetry_group
from tests.symmetrization.networks import Dense, assert_close, dense, random_images, tiny

HOW = ("average", "weighted", "choose", "canonical")


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_network_stays(training: bool) -> None:
    model = tiny("vit").train(training)
    f = flopeq.symmetrize(model, "d4", "weighted")
    assert f.training == f.weight_net.training == f.model.training == training
    f.train(not training)
    assert model.training != training


def test_names_of_weights_have_one_prefix() -> None:
    model = tiny("vit")
    f = flopeq.symmetrize(model, "d4")
    assert [*f.state_dict()] == [f"model.{name}" for name in model.state_dict()]
    f.model.load_state_dict(model.state_dict())
    weighted = flopeq.symmetrize(model, "d4", "weighted")
    assert {name.split(".")[0] for name in weighted.state_dict()} == {"model", "weight_net"}


@pytest.mark.parametrize("kind", ["vit", "resnet", "swin", "E(resmlp)"])
def test_attributes_and_methods_are_those_of_the_network(kind: str) -> None:
    model, x = tiny(kind), random_images()
    f = flopeq.symmetrize(model, "d4")
    assert f.num_classes == 5 and f.num_features == model.num_features
    assert f.head_hidden_size == model.head_hidden_size and f.feature_info == model.feature_info
    assert f.get_classifier() is model.get_classifier()
    assert f.get_submodule(f.pretrained_cfg["classifier"]) is model.get_submodule(model.pretrained_cfg["classifier"])
    assert f.get_submodule(f.default_cfg["first_conv"]) is model.get_submodule(model.pretrained_cfg["first_conv"])
    assert timm.data.resolve_model_data_config(f) == timm.data.resolve_model_data_config(model)
    assert f.forward_head(f.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)
    f.reset_classifier(3)
    assert f(x).shape == (2, 3) and f.num_classes == 3
    f.double().reset_classifier(0)
    assert f(x).shape == (2, model.head_hidden_size)


def test_a_network_without_timms_attributes_has_none() -> None:
    f = flopeq.symmetrize(dense(), "flop", output="grid")
    assert not hasattr(f, "num_classes") and not hasattr(f, "pretrained_cfg")


@pytest.mark.parametrize("kind", ["vit", "resnet", "E(convnext)"])
def test_groups_of_parameters_are_those_of_the_network(kind: str) -> None:
    model = tiny(kind)
    f = flopeq.symmetrize(model, "flop")
    for ours, theirs in zip(
        param_groups_layer_decay(f, layer_decay=0.5, no_weight_decay_list=f.no_weight_decay()),
        param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=no_weight_decay(model)),
        strict=True,
    ):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        assert (ours["weight_decay"], ours["lr_scale"]) == (theirs["weight_decay"], theirs["lr_scale"])
    assert create_optimizer_v2(f, opt="adamw", weight_decay=0.1, layer_decay=0.9)


def no_weight_decay(model: nn.Module) -> set[str]:
    return model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()


def test_negated_sets_in_patterns_stay() -> None:
    class Grouped(nn.Module):
        def group_matcher(self, coarse: bool) -> dict:
            return {"stem": r"^stem|^embed", "blocks": [(r"^blocks\.([^.]+)", None), (r"norm", (99999,))]}

    groups = flopeq.symmetrize(Grouped(), "flop").group_matcher()
    assert groups["stem"] == r"^model\.(?:stem|embed)"
    assert groups["blocks"] == [(r"^model\.(?:blocks\.([^.]+))", None), (r"^model\.(?:norm)", (99999,))]


def test_checkpointing_of_activations_changes_no_gradient() -> None:
    f, x = flopeq.symmetrize(tiny("vit"), "d4"), random_images()
    gradients = []
    for enable in (False, True):
        f.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(f(x).square().sum(), list(f.parameters())))
    assert f.model.grad_checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(checkpointed, plain)


def test_intermediates_take_timms_arguments() -> None:
    f, x = flopeq.symmetrize(tiny("vit"), "flop", "choose"), random_images()
    final, [first, second] = f.forward_intermediates(x)
    assert first.shape == (2, 8, 4, 4) and final.shape == (2, 17, 8)
    assert_close(f.forward_intermediates(x, indices=[0], intermediates_only=True, stop_early=True)[0], first)
    tokens = f.forward_intermediates(x, indices=1, output_fmt="NLC", intermediates_only=True)
    assert_close(tokens[0], second.flatten(2).transpose(1, 2))
    pairs = f.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True)
    prefix = f.forward_intermediates(FLOP(x), return_prefix_tokens=True, intermediates_only=True)[1][1]
    assert_close(pairs[0][0], first)
    assert_close(prefix, pairs[1][1])
    assert_close(f.forward_intermediates(x, norm=True)[1][1], final[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    with pytest.raises(ValueError, match="NHWC"):
        f.forward_intermediates(x, output_fmt="NHWC")


def test_features_only_networks_of_timm_are_equivariant() -> None:
    f, x = flopeq.symmetrize(tiny("vit"), "flop"), random_images()
    _, blocks = f.forward_intermediates(x)
    extractor = FeatureGetterNet(f, out_indices=(0, 1))
    for found, block in zip(extractor(x), blocks, strict=True):
        assert_close(found, block)


def test_tokens_without_a_known_grid_are_refused() -> None:
    model = tiny("vit")
    model.patch_embed.dynamic_feat_size = lambda size: (3, 4)
    f = flopeq.symmetrize(model, "flop")
    with pytest.raises(ValueError, match="17 tokens whose grid it does not tell"):
        f.forward_features(random_images())


def test_an_image_of_another_size_is_accepted_where_the_network_accepts_it() -> None:
    f, x = flopeq.symmetrize(tiny("vit", dynamic_img_size=True), "d4"), random_images(1, 24, 24)
    assert_close(f(FLOP(x)), f(x))
    assert_close(f.forward_features(FLOP(x))[:, 0], f.forward_features(x)[:, 0])
    f.set_input_size((8, 8))
    assert f(random_images(1, 8, 8)).shape == (1, 5)


@pytest.mark.parametrize("how", HOW)
def test_flops_are_those_of_the_passes(how: str, caplog) -> None:
    model = tiny("vit")
    alone = complexity(model, (3, 16, 16))
    for group in ("flop", "d4"):
        counted = complexity(flopeq.symmetrize(model, group, how), (3, 16, 16))
        passes = 1 if how == "canonical" else len(symmetry_group(group))
        weights = passes * 8 * 32 + passes * 32 if how == "weighted" else 0
        assert counted.macs == passes * alone.macs + weights
        extra = counted.elementwise - passes * alone.elementwise
        assert 0 < extra < 8 * 4 * 3 * 16 * 16
        assert (counted.params == alone.params) == (how != "weighted")
    assert "no cost is stated" not in caplog.text


def test_batch_statistics_of_one_batch_are_invariant_in_training() -> None:
    """With all passes in one batch, BatchNorm sees every element of the group, whichever images are flopped."""
    torch.manual_seed(0)
    f, x = flopeq.symmetrize(Dense().train(), "flop", output="grid"), random_images()
    one_flopped = torch.stack([FLOP(x[0]), x[1]])
    expected = f(x)
    assert_close(f(one_flopped)[0], FLOP(expected[0]))
    assert_close(f(one_flopped)[1], expected[1])
    alone = flopeq.symmetrize(Dense().train(), "flop", output="grid", batched=False)
    assert (alone(one_flopped)[1] - alone(x)[1]).abs().max() > 1e-6


def test_copies_and_pickles_compute_the_same() -> None:
    for how in HOW:
        f, x = flopeq.symmetrize(tiny("vit"), "d4", how), random_images()
        for other in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
            assert torch.equal(other(x), f(x))
            assert other.model is not f.model


@pytest.mark.parametrize("how", HOW)
def test_torch_export_gives_the_same_logits_for_any_batch(how: str) -> None:
    f = flopeq.symmetrize(tiny("vit"), "d4", how).float()
    exported = torch.export.export(
        f, (random_images(3).float(),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    ).module()
    for batch in (2, 5):
        x = random_images(batch).float()
        torch.testing.assert_close(exported(x), f(x))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_compiled_in_one_graph_it_computes_the_same(how: str) -> None:
    f, x = flopeq.symmetrize(tiny("vit"), "d4", how), random_images()
    assert_close(torch.compile(f, fullgraph=True)(x), f(x))
    mask = flopeq.symmetrize(dense(), "d4", output="grid")
    assert_close(torch.compile(mask, fullgraph=True)(x), mask(x))


def test_one_graph_is_captured_without_a_break() -> None:
    for how in HOW:
        f, x = flopeq.symmetrize(tiny("vit"), "d4", how), random_images()
        assert_close(torch.compile(f, fullgraph=True, backend="eager")(x), f(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("how", ["average", "choose", "canonical"])
def test_onnx_gives_the_same_logits(how: str, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    f, path = flopeq.symmetrize(tiny("resnet"), "d4", how).float(), tmp_path / "model.onnx"
    torch.onnx.export(
        f, (random_images(3).float(),), path, dynamo=True, verbose=False, input_names=["images"],
        output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        x = random_images(batch).float()
        [logits] = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), f(x).detach(), rtol=1e-3, atol=1e-4)
