"""The first product on a card, which tells whether kernels can be built, launched and trusted.

What it is: one row by a small matrix, compared with torch. Triton builds a launcher with the
system's C compiler and Python's headers, which many a desktop lacks; that shows only when something
is launched. And tensor cores give right sums only where Triton has spread the numbers over threads
as tensor_core.py expects; a version that does otherwise should show here, before an answer is
wrong. What it is not: a check of every kernel and format, which the tests of compiled kernels are;
or imported where Triton is missing (support.py asks for it).
"""

from dataclasses import replace
from functools import partial

import torch

from m1local.cuda.activation import Activation
from m1local.cuda.matrix import int4_matrix, tiled
from m1local.cuda.one_row import vector_product

ROWS, COLUMNS, GROUP = 40, 1536, 64  # no whole program of rows, no whole round of columns
MOST_ERROR = 1e-3


def is_right(device: torch.device) -> bool:
    """Multiply on `device` and wait; raises whatever a compiler or driver raises."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = partial(torch.rand, generator=generator, device="cpu", dtype=torch.float32)
    codes = (256 * drawn((ROWS, COLUMNS // 2))).to(torch.uint8)
    scales, zeros = drawn((2, ROWS, COLUMNS // GROUP)).bfloat16()
    x = drawn((1, COLUMNS)) - 0.5
    stored = [tensor.to(device) for tensor in (codes, tiled(scales), tiled(zeros))]
    matrix = int4_matrix(stored[0], stored[1], stored[2], (ROWS, COLUMNS), GROUP)
    matrix = replace(matrix, is_tiled=True)
    found = vector_product(Activation.of(x.to(device)), matrix).sum(0).cpu()
    levels = torch.stack((codes & 15, codes >> 4), 2).view(ROWS, -1, GROUP).float() - 8
    weights = levels * scales.float()[..., None] + zeros.float()[..., None]
    wanted = weights.view(ROWS, COLUMNS) @ x[0]
    return float((found - wanted).norm() / wanted.norm()) < MOST_ERROR  # and a number
