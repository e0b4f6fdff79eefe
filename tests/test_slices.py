"""Slices of a matrix handed to threads: the same bytes, errors passed on, torch left as it was."""

import subprocess
import sys
import time

import pytest
import torch

from m1local.formats import LinearSpec
from m1local.formats.slices import ROWS_QUANTIZED, for_slices
from tests.conftest import ROOT
from tests.test_formats import BNB_INT8, NF4, assert_bit_equal, every_spec, matrix, store


@every_spec
def test_several_threads_quantize_to_the_same_bytes(spec: LinearSpec) -> None:
    weight = matrix((5 * ROWS_QUANTIZED + 20, 128))
    alone = store(weight, spec)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = store(weight, spec)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert_bit_equal(together, alone)


@pytest.mark.parametrize("spec", [NF4, BNB_INT8], ids=lambda spec: spec.format)
def test_threads_may_be_the_first_to_need_bitsandbytes(spec: LinearSpec) -> None:
    code = (
        "import torch\n"
        "torch.set_num_threads(3)\n"
        "from m1local.formats import LinearSpec, format_class\n"
        f"spec = {spec!r}\n"
        "weight = torch.randn(640, 128)\n"
        "format_class(spec.format).quantize_matrix(lambda a, b: weight[a:b], (640, 128), spec)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_error_in_a_slice_is_raised_and_the_rest_is_left() -> None:
    before, done = torch.get_num_threads(), []

    def work(start: int, stop: int) -> None:
        if start == 2 * ROWS_QUANTIZED:
            raise ValueError("a bad row")
        done.append(start)
        time.sleep(0.01)

    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="a bad row"):
            for_slices(work, 1000 * ROWS_QUANTIZED, ROWS_QUANTIZED)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(done) < 900
