"""hqq in C before anything is rounded for storage: the power, and scale and zero, to the last bit.

What is stored has 8 bits of the zero and would hide a difference; so a shim around groups.c, which
is compiled as the library is, says the rest.
"""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m1local.formats.groups import range_of
from m1local.native import library
from m1local.native import quantize as native
from m1local_quantize.methods import hqq
from tests.test_native import KINDS

LANES = 16
SHIM = r"""
#include "groups.c"
M1_EXPORT void powers_of(const float *x, int count, const Shrinkage *shrinkage, float *found)
{
    for (int i = 0; i < count; i++)
        found[i] = power_of(x[i], shrinkage);
}
M1_EXPORT void chosen_by(
    const float *groups, const Levels *levels, const Shrinkage *shrinkage, float *scale,
    float *zero)
{
    Lanes weights[LONGEST], low, high;
    load(groups, 1, levels->size, weights);
    find_range(weights, levels->size, &low, &high);
    hqq(weights, levels, shrinkage, &low, &high, (Lanes *)scale, (Lanes *)zero);
}
"""
pytestmark = pytest.mark.skipif(library.library() is None, reason=library.status().text)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("shim")
    source, built = folder / "shim.c", folder / f"shim{library.SUFFIX}"
    source.write_text(SHIM)
    compiler = library._compiler()
    if compiler.stem.lower() in ("cl", "clang-cl"):
        pytest.skip("the shim is compiled with the flags of gcc and clang")
    for flags in library._all_flags(compiler):
        command = [str(compiler), *flags, "-I", str(library.SOURCES), "-o", str(built), str(source)]
        if not subprocess.run([*command, "-lm"], capture_output=True).returncode:
            return ctypes.CDLL(str(built))
    raise AssertionError("nothing compiles")


def bits(values: Tensor) -> list[int]:
    found: list[int] = values.contiguous().view(torch.int32).flatten().tolist()
    return found


def test_the_power_has_torchs_bits(shim: ctypes.CDLL) -> None:
    exponents = torch.empty(200_001).uniform_(-30, 128, generator=torch.Generator().manual_seed(1))
    x = torch.cat((2**exponents, torch.tensor([1e-9, 1.0, 1.9999999, torch.inf])))
    found = torch.empty_like(x)
    shrinkage = native._Shrinkage.of(hqq.COMPILED)
    shim.powers_of(library.address(x), len(x), ctypes.byref(shrinkage), library.address(found))
    assert bits(found) == bits(hqq.power(x))


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("highest", [7, 15, 31, 63])
@pytest.mark.parametrize("kind", ["normal", "heavy", "far from zero", "half constant"])
def test_scale_and_zero_have_torchs_bits(
    shim: ctypes.CDLL, size: int, highest: int, kind: str
) -> None:
    levels = native._Levels(size, highest, (highest + 1) // 2, 1, 0, hqq.ITERATIONS, 0.0)
    shrinkage = native._Shrinkage.of(hqq.COMPILED)
    groups = KINDS[kind]((LANES, size), highest).contiguous()
    scale, zero = torch.empty(2, LANES)
    shim.chosen_by(
        library.address(groups), ctypes.byref(levels), ctypes.byref(shrinkage),
        library.address(scale), library.address(zero),
    )  # fmt: skip
    low, high = range_of(grouped := groups[:, None])
    even = ((high - low) / highest).clamp_min(hqq.SMALLEST)
    scales, zeros = hqq.optimize(grouped, even, low, highest)
    varies = high > low
    middles = torch.where(varies, scales * (levels.middle - zeros), low)
    assert bits(scale) == bits(torch.where(varies, scales, 0))
    assert bits(zero) == bits(middles)
