"""The formats of bitsandbytes are bitsandbytes' own, and importing it stays quiet.

The package itself is the oracle: what its layers save is what is stored, bit for bit.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from m1local.errors import DependencyError
from m1local.formats import LinearSpec, bnb
from tests.test_formats import (
    BFLOAT16,
    BNB_INT8,
    FP4,
    NF4,
    NF4_DQ,
    activations,
    assert_bit_equal,
    assert_products,
    build,
    matrix,
    store,
)


@pytest.mark.parametrize("spec", [NF4, NF4_DQ, FP4], ids=lambda spec: spec.format)
def test_a_plain_linear4bit_stores_and_loads_the_same_bits(spec: LinearSpec) -> None:
    nn = bnb.bitsandbytes().nn
    weight = matrix((96, 192))
    stored = store(weight, spec)
    options = {
        "quant_type": spec.format.split("-")[1],
        "compress_statistics": spec == NF4_DQ,
    }
    plain = nn.Linear4bit(192, 96, bias=False, **options)
    plain.weight = nn.Params4bit(weight, requires_grad=False, module=plain, **options)
    expected = plain.to("cpu").state_dict()
    if spec == NF4_DQ:  # ours has blanks at its end, so that its length is known beforehand
        described = stored[bnb.NF4_STATE]
        length = expected[bnb.NF4_STATE].numel()
        assert bytes(described[length:].tolist()).isspace()
        assert_bit_equal(expected, stored | {bnb.NF4_STATE: described[:length]})
    else:
        assert_bit_equal(expected, stored)
    loaded = nn.Linear4bit(192, 96, bias=False, quant_type=options["quant_type"], device="meta")
    statistics = {name: tensor for name, tensor in stored.items() if name != "weight"}
    loaded.weight = nn.Params4bit.from_prequantized(
        stored["weight"], statistics, device="cpu", module=loaded
    )
    x = activations(3, 192)
    assert_bit_equal(build(weight, spec)(x), loaded.eval()(x))
    assert_bit_equal(build(weight, spec)(x), plain.eval()(x))


def test_rows_that_fill_no_block_are_not_rearranged(monkeypatch: pytest.MonkeyPatch) -> None:
    # bitsandbytes rearranges blocks of 32 rows, and asserts that there are no others.
    monkeypatch.setattr(bnb.bitsandbytes().nn.modules, "has_avx512bf16", lambda: True)
    assert_products(build(matrix((70, 192)), NF4), activations(1, 192), tolerance=BFLOAT16)


def test_a_plain_linear8bitlt_stores_and_loads_the_same_bits() -> None:
    nn = bnb.bitsandbytes().nn
    weight = matrix((70, 192))
    stored = store(weight, BNB_INT8)
    plain = nn.Linear8bitLt(192, 70, bias=False, has_fp16_weights=False)
    plain.weight.data = weight.clone()
    assert_bit_equal(plain.to("cpu").state_dict(), stored)
    loaded = nn.Linear8bitLt(192, 70, bias=False, has_fp16_weights=False).to("cpu")
    loaded.load_state_dict(stored)
    x = activations(3, 192)
    assert_bit_equal(build(weight, BNB_INT8)(x), loaded.eval()(x))


# Makes any processor look like one with AVX512-BF16, where bitsandbytes asks for `kernels`.
IMPORT_BNB = """
import sys
import m1local.formats.bnb as bnb
assert "bitsandbytes" not in sys.modules, "importing the format must not import the package"

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes.backends.cpu.ops":
            import bitsandbytes.functional as functional
            functional.has_avx512bf16 = lambda: print("asked") or True

sys.meta_path.insert(0, Finder())
bnb.bitsandbytes()
assert "kernels" not in sys.modules
import kernels
"""


def test_importing_bitsandbytes_never_imports_kernels_and_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("print('kernels was imported')")
    folders = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    command, env = [sys.executable, "-c", IMPORT_BNB], os.environ | {"PYTHONPATH": folders}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stderr == ""
    # Asked for at import once, and let through again afterwards.
    assert done.stdout.split("\n", 1) == ["asked", "kernels was imported\n"]


def test_a_loaded_kernels_package_is_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = ModuleType("kernels")
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    bnb._import.__wrapped__()
    assert sys.modules["kernels"] is kernels


def test_a_missing_bitsandbytes_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DependencyError, match="pip install bitsandbytes"):
        bnb._import.__wrapped__()
