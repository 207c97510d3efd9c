# ruff: noqa: B023  the timed lambdas run inside the iteration that defines them
"""Products of even and odd halves in Triton, compared with cuBLAS.

    python benchmarks/gpu_products.py                       times one block's products on a GPU
    TRITON_INTERPRET=1 python benchmarks/gpu_products.py    compares the kernels with float64 on a CPU

`paired_linear` computes both products of a `FlopLinear` in one launch. Its input and output have joined halves, or the
channels of attention heads (each head even then odd), so no copy has to gather them. `paired_gelu_linear` also applies
`FlopGELU` before it stores the result.

Shape suffixes: M rows, K input channels of one half, N output channels of one half.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

SQRT_HALF = 0.5**0.5
BLOCK_SHAPES = {"S": (384, 197, 6), "B": (768, 197, 12), "L": (1024, 197, 16), "H": (1280, 257, 16)}
"""Channels, tokens and heads of the ViTs."""


@triton.jit
def _column(index, parity, width, HEAD_HALF: tl.constexpr):
    """Column of channel `index` of a half: in joined halves, or in heads of HEAD_HALF even and odd channels."""
    if HEAD_HALF == 0:
        return parity * width + index
    else:
        return index // HEAD_HALF * (2 * HEAD_HALF) + parity * HEAD_HALF + index % HEAD_HALF


@triton.jit
def _tile(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile of a program. Tiles are ordered in groups of rows that share weights in the L2 cache."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    per_group = GROUP * tiles_n
    first = pid // per_group * GROUP
    size = min(tiles_m - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def _paired_linear_kernel(
    x, w, b, y, M, N, K, stride_x, stride_y,
    HAS_BIAS: tl.constexpr, IN_HEAD_HALF: tl.constexpr, OUT_HEAD_HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    parity = tl.program_id(1)
    tile_m, tile_n = _tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.where(rows < M, rows, 0)
    safe_columns = tl.where(columns < N, columns, 0)
    w_at = w + parity * N * K + safe_columns[None, :] * K
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_at = x + safe_rows[:, None] * stride_x + _column(k, parity, K, IN_HEAD_HALF)[None, :]
        sums = tl.dot(tl.load(x_at, (k < K)[None, :], 0.0), tl.load(w_at + k[:, None], (k < K)[:, None], 0.0), sums)
    if HAS_BIAS:
        sums += tl.where(parity == 0, tl.load(b + safe_columns).to(tl.float32), 0.0)[None, :]
    y_at = y + rows[:, None] * stride_y + _column(columns, parity, N, OUT_HEAD_HALF)[None, :]
    tl.store(y_at, sums.to(y.dtype.element_ty), (rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def _paired_gelu_linear_kernel(
    x, w, b, y, M, N, K, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.where(rows < M, rows, 0)
    safe_columns = tl.where(columns < N, columns, 0)
    x_at = x + safe_rows[:, None] * stride_x
    w_at = w + safe_columns[None, :] * K
    even = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    odd = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_x, in_w = (k < K)[None, :], (k < K)[:, None]
        even = tl.dot(tl.load(x_at + k[None, :], in_x, 0.0), tl.load(w_at + k[:, None], in_w, 0.0), even)
        odd = tl.dot(tl.load(x_at + K + k[None, :], in_x, 0.0), tl.load(w_at + N * K + k[:, None], in_w, 0.0), odd)
    even += tl.load(b + safe_columns).to(tl.float32)[None, :]
    half: tl.constexpr = 0.7071067811865476
    left, right = (even + odd) * half, (even - odd) * half
    left = 0.5 * left * (1 + tl.erf(left * half))
    right = 0.5 * right * (1 + tl.erf(right * half))
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    y_at = y + rows[:, None] * stride_y + columns[None, :]
    tl.store(y_at, ((left + right) * half).to(y.dtype.element_ty), mask)
    tl.store(y_at + N, ((left - right) * half).to(y.dtype.element_ty), mask)


def _configs(*tiles: tuple[int, int, int, int, int]) -> list[triton.Config]:
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in tiles
    ]


_tuned_linear = triton.autotune(
    _configs((128, 128, 32, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (128, 64, 32, 4, 4),
             (64, 128, 64, 4, 3), (64, 64, 64, 4, 4)),
    key=["M", "N", "K", "IN_HEAD_HALF", "OUT_HEAD_HALF"],
)(_paired_linear_kernel)  # fmt: skip
_tuned_gelu_linear = triton.autotune(
    _configs((128, 64, 64, 8, 3), (128, 64, 32, 8, 4), (64, 64, 64, 4, 3), (64, 128, 32, 8, 3), (128, 128, 32, 8, 3)),
    key=["M", "N", "K"],
)(_paired_gelu_linear_kernel)
_TEST_TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8}


@torch.library.triton_op("flopeq_benchmark::paired_linear", mutates_args=())
def paired_linear(x: Tensor, w: Tensor, b: Tensor | None, in_head_half: int, out_head_half: int) -> Tensor:
    """x_even W_even^T + b and x_odd W_odd^T, in one launch.

    Shape: (M, 2K), (2, N, K), (N,) -> (M, 2N). A head half of 0 stands for joined halves.
    """
    M, (_, N, K) = x.shape[0], w.shape
    y = x.new_empty(M, 2 * N)
    args = (x, w, w if b is None else b, y, M, N, K, x.stride(0), y.stride(0), b is not None, in_head_half,
            out_head_half)  # fmt: skip
    if triton.knobs.runtime.interpret:
        _paired_linear_kernel[(triton.cdiv(M, 64) * triton.cdiv(N, 64), 2)](*args, **_TEST_TILE)
    else:
        grid = lambda tile: (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]), 2)  # noqa: E731
        torch.library.wrap_triton(_tuned_linear)[grid](*args)
    return y


@torch.library.triton_op("flopeq_benchmark::paired_gelu_linear", mutates_args=())
def paired_gelu_linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """FlopGELU of both products. Shape: (M, 2K), (2, N, K), (N,) -> (M, 2N)."""
    M, (_, N, K) = x.shape[0], w.shape
    y = x.new_empty(M, 2 * N)
    args = (x, w, b, y, M, N, K, x.stride(0), y.stride(0))
    if triton.knobs.runtime.interpret:
        _paired_gelu_linear_kernel[(triton.cdiv(M, 64) * triton.cdiv(N, 64),)](*args, **_TEST_TILE)
    else:
        grid = lambda tile: (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)  # noqa: E731
        torch.library.wrap_triton(_tuned_gelu_linear)[grid](*args)
    return y


def reference(
    x: Tensor, w: Tensor, b: Tensor | None = None, in_head_half: int = 0, out_head_half: int = 0, gelu: bool = False
) -> Tensor:
    """The same in float64 by PyTorch's own operators."""
    (_, N, K), M = w.shape, x.shape[0]
    x, w = x.double(), w.double()
    if in_head_half:
        even, odd = x.view(M, -1, 2, in_head_half).transpose(1, 2).reshape(M, 2, K).unbind(1)
    else:
        even, odd = x.chunk(2, 1)
    even, odd = even @ w[0].T, odd @ w[1].T
    if b is not None:
        even = even + b.double()
    if gelu:
        left, right = (F.gelu(z) for z in ((even + odd) * SQRT_HALF, (even - odd) * SQRT_HALF))
        even, odd = (left + right) * SQRT_HALF, (left - right) * SQRT_HALF
    if out_head_half:
        return torch.stack((even.view(M, -1, out_head_half), odd.view(M, -1, out_head_half)), 2).reshape(M, 2 * N)
    return torch.cat((even, odd), 1)


def largest_error(device: str, dtype: torch.dtype, shapes: tuple[tuple[int, int, int], ...]) -> float:
    """Largest |y - reference| / |reference| (2-norms) over shapes (M, N, K) and layouts."""
    torch.manual_seed(0)
    errors = []
    for M, N, K in shapes:
        x = torch.randn(M, 2 * K, device=device, dtype=dtype)
        w = (torch.randn(2, N, K, device=device) / K**0.5).to(dtype)
        b = torch.randn(N, device=device, dtype=dtype)
        for bias, into, out in ((b, 0, 8), (None, 8, 0), (b, 0, 0), (None, 0, 0)):
            errors.append((paired_linear(x, w, bias, into, out), reference(x, w, bias, into, out)))
        errors.append((paired_gelu_linear(x, w, b), reference(x, w, b, gelu=True)))
    return max(float((found.double() - expected).norm() / expected.norm()) for found, expected in errors)


def time_products(seconds: float, batch_size: int = 64) -> list[dict[str, str | float]]:
    """Microseconds of each product of a block, and of attention, in float16, until `seconds` have passed.

    `X` is the ordinary product, `halves` two products of contiguous halves by cuBLAS, `strided_halves` the same on
    views of joined halves, `batched` one batched product, `triton` the kernels above.
    """
    from triton.testing import do_bench_cudagraph

    def bench(run: Callable[[], object]) -> float:
        return round(1e3 * do_bench_cudagraph(run, return_mode="median"), 2)

    def half(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.float16)

    begin, rows = time.monotonic(), []
    for size, (channels, tokens, heads) in BLOCK_SHAPES.items():
        M, head_half = batch_size * tokens, channels // heads // 2
        for name, K, N in (("qkv", 1, 3), ("proj", 1, 1), ("fc1", 1, 4), ("fc2", 4, 1)):
            if time.monotonic() - begin > seconds:
                return rows
            K, N = K * channels // 2, N * channels // 2
            x, W, w = half(M, 2 * K), half(2 * N, 2 * K) / (2 * K) ** 0.5, half(2, N, K) / K**0.5
            bias, b = half(2 * N), half(N)
            views = x.chunk(2, 1)
            even, odd = (view.contiguous() for view in views)
            paired = {
                "qkv": lambda: paired_linear(x, w, b, 0, head_half),
                "proj": lambda: paired_linear(x, w, b, head_half, 0),
                "fc1": lambda: paired_gelu_linear(x, w, b),
                "fc2": lambda: paired_linear(x, w, b, 0, 0),
            }[name]
            row: dict[str, str | float] = {
                "size": size,
                "product": name,
                "X": bench(lambda: F.linear(x, W, bias)),
                "halves": bench(lambda: (F.linear(even, w[0], b), F.linear(odd, w[1]))),
                "strided_halves": bench(lambda: (F.linear(views[0], w[0], b), F.linear(views[1], w[1]))),
                "batched": bench(lambda: torch.bmm(x.view(M, 2, K).transpose(0, 1), w.transpose(1, 2))),
            }
            if name == "fc1":
                row["gelu_after_batched"] = bench(lambda: F.gelu(torch.bmm(x.view(M, 2, K).transpose(0, 1), w.mT)))
            row["triton"] = bench(paired)
            rows.append(row)
        packed = half(batch_size, tokens, 3, heads, channels // heads).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in packed)
        apart = [part.contiguous() for part in (q, k, v)]
        rows.append(
            {
                "size": size,
                "product": "attention",
                "X": bench(lambda: F.scaled_dot_product_attention(q, k, v)),
                "halves": bench(lambda: F.scaled_dot_product_attention(*apart)),
            }
        )
    return rows


if __name__ == "__main__":
    if torch.cuda.is_available():
        for row in time_products(float("inf")):
            print(*row.values(), sep="  ")
    else:
        print(f"largest relative error {largest_error('cpu', torch.float16, ((100, 96, 64), (77, 200, 72))):.1e}")
