"""Triton's interpreter, mended: its dot takes the bits of bfloat16 for whole numbers (3.7.1).

Imported by the tests of kernels, which run in it where there is no card. What it is not: used by
the runtime.
"""

import os
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton (pip install triton==3.7.1)")


def _widened(handle: Any) -> Any:
    """The values of bfloat16 operands as float32; others as they are."""
    if handle.data.dtype != np.uint16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _mend() -> None:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: object, a: Any, b: Any, d: Any, *_: object) -> Any:
        total = np.matmul(_widened(a), _widened(b), dtype=d.data.dtype) + d.data
        return TensorHandle(total, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1":
    _mend()
