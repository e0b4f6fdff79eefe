"""A token's matrices, multiplied by us and by other libraries: a part of bench/gpu.py.

What it is: products on matrices of the model's sizes, many of each in one graph, so that none is
read from a cache. What it is not: whole models.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_model import FORMATS, random_matrix
from bench.gpu_subject import Subject, milliseconds
from m1local.cuda import int4pack
from m1local.formats.bnb import bitsandbytes

Multiply = Callable[[tuple[int, int], Tensor], Callable[[], object]]  # a matrix's shape, and x


def peers(subject: Subject) -> dict[str, dict[str, Any]]:
    """Milliseconds that a token's matrices take, but for the head; and a prompt's in bfloat16."""
    found: dict[str, dict[str, Any]] = {}
    ways: dict[str, tuple[Multiply, float]] = {  # with the bits of a weight
        **{f"m1local {name}": (partial(_ours, name), 8 if name == "int8" else 4)
           for name in FORMATS},
        "bitsandbytes NF4": (_nf4, 4), "int4pack": (_pack, 4), "bf16 cuBLAS": (_bf16, 16),
    }  # fmt: skip
    for name, (multiply, bits) in ways.items():
        try:
            found[name] = _all(multiply, bits, 1, subject, "token_ms")
        except Exception as error:  # a peer that fails here is a finding, not the end
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
    chunks = -(-subject.prompt // subject.chunk)
    chunk = _all(_bf16, 16, subject.chunk, subject, "chunk_ms")
    found["bf16 cuBLAS"]["prompt_ms"] = chunks * chunk["chunk_ms"]
    return found


def _all(multiply: Multiply, bits: float, rows: int, subject: Subject, name: str) -> dict[str, Any]:
    """Milliseconds of all of a token's products; and why one was launched without a graph."""
    total, reasons = 0.0, set()
    for shape, count in subject.shapes.items():
        taken, reason = _timed(multiply, shape, bits, rows, subject)
        total += count * taken
        reasons.add(reason)
    return {name: total, "why_no_graph": "; ".join(sorted(reasons - {""}))}


def _timed(
    multiply: Multiply, shape: tuple[int, int], bits: float, rows: int, subject: Subject
) -> tuple[float, str]:
    """Milliseconds of one product: of many on copies of the matrix, launched as one graph."""
    from m1local.cuda.replay import Replay

    device = subject.device
    copies = max(1, -(-subject.caches // int(shape[0] * shape[1] * bits / 8)))
    x = torch.randn((rows, shape[1]), device=device).to(subject.dtype)
    products = [multiply(shape, x) for _ in range(copies)]

    def work() -> None:
        for product in products:
            product()

    replay = Replay(work, device)
    return milliseconds(replay, subject) / copies, replay.reason


def _ours(name: str, shape: tuple[int, int], x: Tensor) -> Callable[[], object]:
    """As a step multiplies: x lies as the kernel reads it, and who reads the parts sums them."""
    from m1local.cuda.activation import Activation
    from m1local.cuda.one_row import vector_product

    matrix = random_matrix(shape, FORMATS[name], x.device).on_card()
    assert matrix is not None
    row = Activation.of(x)
    return lambda: vector_product(row, matrix)


def _bf16(shape: tuple[int, int], x: Tensor) -> Callable[[], object]:
    weight = torch.randn(shape, device=x.device).to(x.dtype)
    return lambda: x @ weight.T


def _nf4(shape: tuple[int, int], x: Tensor) -> Callable[[], object]:
    module = random_matrix(shape, FORMATS["nf4"], x.device)
    assert bitsandbytes()
    inner: Callable[[Tensor], object] = module.inner  # type: ignore[assignment]  # a Linear4bit
    return lambda: inner(x)


def _pack(shape: tuple[int, int], x: Tensor) -> Callable[[], object]:
    rows, columns = shape
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=x.device)
    packed = int4pack.pack(codes)
    scales = torch.ones((columns // 64, rows, 2), dtype=torch.bfloat16, device=x.device)
    return lambda: int4pack.multiply(x, packed, 64, scales)
