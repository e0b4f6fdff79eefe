"""Triton's interpreter, mended (3.7.1).

Its dot takes the bits of bfloat16 for whole numbers; and whenever a kernel calls a function it
looks anew through all that the language has, which takes much of the time.
Imported by the tests of kernels, which run in it where there is no card. What it is not: used by
the runtime.
"""

import os
from dataclasses import replace
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
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    def create_dot(self: object, a: Any, b: Any, d: Any, *_: object) -> Any:
        total = np.matmul(_widened(a), _widened(b), dtype=d.data.dtype) + d.data
        return TensorHandle(total, d.dtype.scalar)

    anew = InterpretedFunction.__call__

    def called(self: Any, *args: Any, **options: Any) -> Any:
        if self.fn.__module__.startswith("triton."):  # which knows parts of the language by others
            return anew(self, *args, **options)
        return self.rewrite()(*args, **options)

    InterpreterBuilder.create_dot = create_dot
    InterpretedFunction.__call__ = called


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    _mend()


def without_overflow_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute no sum and product of whole numbers a second time, in 64 bits, to see if it fits.

    For tests that go through whole steps; those of single kernels look.
    """
    if INTERPRETED:
        from triton.runtime.interpreter import interpreter_builder

        options = replace(interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter_builder, "options", options)
