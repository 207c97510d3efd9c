"""torch's own tools: hooks, torch.func, tracing, ONNX, counters, sharding, dynamic quantization."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from flopeq.measure.flops import complexity
from flopeq.models.build import build
from flopeq.testing import equivariance_error, relative_error
from tests.models.conftest import random_images
from tests.tools.conftest import NAMES, linear_layers, unfuse_attention

DEPRECATED = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)


@pytest.mark.parametrize("training", [False, True])
def test_forward_hooks_fire_on_every_module_that_owns_parameters(model: nn.Module, training: bool) -> None:
    fired = {}
    for key, module in model.train(training).named_modules():
        module.register_forward_hook(lambda module, args, result, key=key: fired.update({key: result}))
    model(random_images())
    owners = {key for key, module in model.named_modules() if any(p is not None for p in module._parameters.values())}
    assert owners | {"blocks"} <= set(fired)
    assert fired["blocks.0"].shape == fired["blocks.2"].shape


def test_a_hook_changes_what_a_layer_computes(name: str, model: nn.Module) -> None:
    x, layers = random_images(), linear_layers(model)
    if name == "flop_convnext_iso_base":
        del layers["blocks.2.mlp.fc2.odd"]  # which the head never reads
    for key, layer in layers.items():
        before = model(x)
        with layer.register_forward_hook(lambda module, args, result: 1.5 * result):
            assert relative_error(model(x), before) > 1e-6, key


def test_copies_and_pickles_compute_the_same(model: nn.Module) -> None:
    x = random_images()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


class Wrapped(nn.Module):
    """What a training framework does: the model is an attribute, and a step calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).square().mean()


def test_a_wrapping_module_trains_and_restores_the_model(model: nn.Module) -> None:
    wrapped, fresh = Wrapped(model).train(), Wrapped(copy.deepcopy(model))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = wrapped.training_step(random_images())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    fresh.load_state_dict(wrapped.state_dict(), strict=True)
    assert torch.equal(fresh.eval().model(random_images()), wrapped.eval().model(random_images()))


def test_functional_call_takes_other_parameters(model: nn.Module) -> None:
    other = {key: 0.9 * parameter.detach() for key, parameter in model.named_parameters()}
    expected = copy.deepcopy(model)
    expected.load_state_dict(other, strict=False)
    torch.testing.assert_close(functional_call(model, other, (random_images(),)), expected(random_images()))


def test_vmap_gives_gradients_per_image(model: nn.Module) -> None:
    unfuse_attention(model)
    x, parameters = random_images(), dict(model.named_parameters())

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index, image in enumerate(x):
        for key, expected in grad(loss)(parameters, image).items():
            torch.testing.assert_close(found[key][index], expected)


@DEPRECATED  # jvp itself uses torch.jit.script
@torch.no_grad()
def test_jvp_is_the_derivative_without_gradients_too(model: nn.Module) -> None:
    unfuse_attention(model)
    x, tangent, step = random_images(), torch.randn_like(random_images()), 1e-6
    _, found = jvp(model, (x,), (tangent,))
    expected = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
    assert relative_error(found, expected) < 1e-6


@DEPRECATED
@torch.no_grad()
def test_traced_models_load_elsewhere(model: nn.Module) -> None:
    x = random_images()
    traced = torch.jit.trace(model, x)
    assert "flopeq::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


@DEPRECATED
@torch.no_grad()
def test_onnx_without_dynamo_gives_the_same_logits(model: nn.Module, tmp_path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    x, path = random_images().float(), tmp_path / "model.onnx"
    torch.onnx.export(model.float(), (x,), path, dynamo=False, input_names=["images"])
    [logits] = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": x.numpy()})
    np.testing.assert_allclose(logits, model(x).numpy(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_counts_are_the_same_with_and_without_weights(model: nn.Module) -> None:
    size = tuple(random_images().shape[1:])
    assert complexity(model, size) == complexity(copy.deepcopy(model).to("meta"), size)


@torch.no_grad()
@pytest.mark.parametrize(("name", "gflops"), [
    ("flop_deit3_small_patch16_224", 2.58), ("flop_convnext_iso_small", 2.25),
    ("flophybrid_deit3_small_patch16_224", 3.62),
])  # fmt: skip
def test_counts_of_the_s_sizes_on_a_cpu(name: str, gflops: float) -> None:
    assert complexity(build(name), (3, 224, 224)).flops / 1e9 == pytest.approx(gflops, abs=0.005)


@torch.no_grad()
def test_torchs_counter_agrees_with_ours(name: str) -> None:
    """In eager mode E(ResMLP) has one more row per layer, and features that nothing reads. Our own count omits both."""
    model = unfuse_attention(build(name, device="meta").eval())
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == pytest.approx(
        2 * complexity(model, (3, 224, 224)).macs, rel=0.02 if "resmlp" in name else 1e-9
    )


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("flop_")])
def test_a_counter_that_hooks_linear_layers_finds_half_of_the_baselines_products(name: str) -> None:
    """thop and ptflops count so: by hooks on modules of type nn.Linear."""
    counts = []
    for key in (name, name.removeprefix("flop_")):
        model, products = build(key, device="meta").eval(), []
        for layer in linear_layers(model.blocks).values():
            layer.register_forward_hook(
                lambda layer, args, result, products=products: products.append(result.numel() * layer.in_features)
            )
        model(torch.empty(1, 3, 224, 224, device="meta"))
        counts.append(sum(products))
    assert counts[1] / counts[0] == pytest.approx(2, rel=0.01)


@pytest.fixture
def process_group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # of results that are views, as in X
@pytest.mark.parametrize("unit", ["linear layers", "parts of blocks", "blocks", "all blocks"])
def test_fsdp2_shards_any_part(model: nn.Module, unit: str, process_group) -> None:
    from torch.distributed.fsdp import fully_shard

    x = random_images()
    expected = copy.deepcopy(model)
    blocks = list(model.blocks)
    parts = [part for block in blocks for part in block.children() if list(part.parameters())]
    for module in {
        "linear layers": list(linear_layers(model).values()), "parts of blocks": parts, "blocks": blocks,
        "all blocks": [model.blocks],
    }[unit]:  # fmt: skip
        fully_shard(module, mesh=process_group)
    fully_shard(model, mesh=process_group)
    torch.testing.assert_close(model(x), expected(x))
    for network in (model.train(), expected.train()):
        network(x).square().sum().backward()
    for found, parameter in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.grad.full_tensor(), parameter.grad)


def test_data_parallel_without_a_gpu_is_the_model(model: nn.Module) -> None:
    if torch.cuda.is_available():
        pytest.skip("replicas need float64 on every GPU")
    x = random_images()
    assert torch.equal(nn.DataParallel(model)(x), model(x))


@DEPRECATED
def test_dynamic_quantization_replaces_every_linear_layer(name: str, model: nn.Module) -> None:
    x, num_layers = random_images().float(), len(linear_layers(model))
    expected = model.float()(x)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    layers = [m for m in quantized.modules() if type(m) is torch.ao.nn.quantized.dynamic.Linear]
    assert len(layers) == num_layers and not linear_layers(quantized)
    assert relative_error(quantized(x), expected) < 0.2
    if name.startswith("flop_"):  # activations are rounded on a grid that is not symmetric about 0
        assert equivariance_error(quantized, x) < 0.1


def test_every_module_can_be_reloaded() -> None:
    """As Jupyter's autoreload does."""
    code = (
        "import flopeq, importlib, sys, warnings; warnings.simplefilter('ignore')\n"
        "for name in [name for name in sys.modules if name.startswith('flopeq')]: importlib.reload(sys.modules[name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
