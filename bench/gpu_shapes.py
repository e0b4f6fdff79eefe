"""Which programs multiply one row fastest: its kernels in other shapes than the table's (card.py).

What it is: for every matrix of a token, microseconds of its kernel in each shape, one after another
in a graph, on copies that no cache holds. What it is not: a choice; whoever reads it changes the
table.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.gpu_model import FORMATS, ROWS, random_matrix
from bench.gpu_subject import Subject, milliseconds
from m1local.cuda.card import RowShape
from m1local.cuda.matrix import Matrix

SHAPES = [
    RowShape(groups, turns)
    for groups, turns in ((1, 4), (1, 8), (2, 4), (2, 2), (4, 1), (4, 2), (8, 1))
]
Work = Callable[[tuple[Matrix, ...], RowShape], object]  # of as many matrices as a kernel reads


def shapes(subject: Subject) -> dict[str, dict[str, float | str]]:
    """Microseconds of each matrix's kernel by the program's shape, "groups x turns"."""
    config, found = subject.config, {}
    width, inner = config.hidden_size, config.intermediate_size
    packed = max(sum(_split(subject, layer)) for layer in range(config.num_hidden_layers))
    for name, kernel, shape, spec in (
        ("gate and up", _gated, (inner, width), FORMATS["int4"]),
        ("down", _added, (width, inner), FORMATS["int4"]),
        ("o_proj", _added, (width, width), FORMATS["int4"]),
        ("W_pack", _vector, (packed, width), FORMATS["int4"]),
        ("head", _vector, (config.vocab_size, width), ROWS),
    ):
        read = 2 if kernel is _gated else 1
        copies = read * max(2, -(-2 * subject.caches // (shape[0] * shape[1])))
        stored = [random_matrix(shape, spec, subject.device).on_card() for _ in range(copies)]
        matrices = [matrix for matrix in stored if matrix is not None]
        groups = [tuple(matrices[at : at + read]) for at in range(0, copies, read)]
        found[name] = _by_shape(kernel(shape, subject), groups, subject)
    return found


def _split(subject: Subject, layer: int) -> tuple[int, int]:
    """Columns of q, and of k and v together."""
    layout = subject.config.heads(layer)
    return layout.num_heads * layout.head_dim, 2 * layout.num_kv_heads * layout.head_dim


def _by_shape(
    work: Work, groups: Sequence[tuple[Matrix, ...]], subject: Subject
) -> dict[str, float | str]:
    from m1local.cuda.replay import Replay

    found: dict[str, float | str] = {}
    for tried in SHAPES:

        def step(tried: RowShape = tried) -> None:
            for matrices in groups:
                work(matrices, tried)

        name = f"{tried.groups} x {tried.turns}"
        try:
            replay = Replay(step, subject.device)
            taken = milliseconds(replay, subject)
        except Exception as error:  # a shape that takes too much is a finding, not the end
            found[name] = f"{type(error).__name__}: {error}"[:200]
        else:
            launched = (
                subject.device.type == "cuda" and replay.reason
            )  # one by one: the host's time
            found[name] = launched or round(1000 * taken / len(groups), 2)
    return found


def _row(columns: int, subject: Subject) -> Any:
    from m1local.cuda.activation import Activation

    return Activation.of(torch.randn((1, columns), device=subject.device).to(subject.dtype))


def _vector(shape: tuple[int, int], subject: Subject) -> Work:
    from m1local.cuda.one_row import vector_product

    x = _row(shape[1], subject)
    return lambda matrices, tried: vector_product(x, matrices[0], tried)


def _gated(shape: tuple[int, int], subject: Subject) -> Work:
    from m1local.cuda.one_row import gated_product

    x, out = _row(shape[1], subject), _row(shape[0], subject)
    return lambda matrices, tried: gated_product(x, matrices[0], matrices[1], out, tried)


def _added(shape: tuple[int, int], subject: Subject) -> Work:
    from m1local.cuda.activation import Activation
    from m1local.cuda.one_row import added_product

    x, rows, device = _row(shape[1], subject), shape[0], subject.device
    stream = torch.zeros(rows, device=device)
    weight = torch.ones(rows, device=device, dtype=subject.dtype)
    out = Activation(rows, dtype=subject.dtype, device=device, eps=1e-6)
    return lambda matrices, tried: added_product(x, matrices[0], stream, weight, out, tried)
