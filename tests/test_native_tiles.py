"""Products in AMX's tiles, without a processor that has them: an emulation stands in for them.

The emulation (emulated_tiles.h) is as strict as the processor, and keeps what would have ended the
program. Its products must have the bits of those in vectors, and be those of the formula. The real
instructions are tried, too: where they trap, the emulation does what they say (trapped_tiles.c).
"""

import ctypes
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m1local.formats import LinearSpec
from m1local.formats.base import QuantizedLinear
from m1local.native import library, matmul
from tests.test_native_matmul import SPECS, SUMS, activations, assert_close, build, rounded

HERE = Path(__file__).parent
EMULATION = HERE / "emulated_tiles.h"
ROWS = [9, 15, 16, 17, 31, 33, 70]
SHAPES = [(1, 128), (33, 640), (70, 256), (130, 1280), (17, 4224)]
INT8 = LinearSpec("int8")

# What a process says in which AMX's instructions trap.
TRAPPED = (
    "import ctypes, sys\n"
    "found = ctypes.CDLL(sys.argv[1])\n"
    "found.m1_emulated_fault.restype = found.m1_instructions.restype = ctypes.c_char_p\n"
    "right, products = found.m1_self_test(), found.m1_emulated_products()\n"
    "fault, instructions = found.m1_emulated_fault(), found.m1_instructions().decode()\n"
    "print(right, products, fault, instructions, sep=',')\n"
)

pytestmark = pytest.mark.skipif(
    matmul.instructions() != "AVX-512 VNNI",
    reason="tiles are emulated beside AVX-512 VNNI, which is not compiled here",
)


def emulated_build(path: Path) -> ctypes.CDLL:
    """The library of a file, its emulation's functions declared."""
    found = ctypes.CDLL(str(path))
    found.m1_emulated_products.restype = ctypes.c_long
    found.m1_emulated_configured.restype = ctypes.c_long
    for name in ("m1_emulated_fault", "m1_instructions"):
        getattr(found, name).restype = ctypes.c_char_p
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / f"emulated{library.SUFFIX}"
    quick = [flag.replace("-O3", "-O1") for flag in library.FLAGS[0]]
    flags = (*quick, f'-DM1_EMULATED_TILES="{EMULATION}"')
    assert library._build(library._compiler(), flags, path) == ""
    return path


@pytest.fixture(scope="module")
def library_of_tiles(built: Path) -> ctypes.CDLL:
    return emulated_build(built)


@pytest.fixture(scope="module")
def refused(built: Path) -> ctypes.CDLL:
    """The same file once more, and a system that does not let it use tiles."""
    copy = built.with_stem("refused")
    shutil.copy(built, copy)
    other = emulated_build(copy)
    other.m1_emulated_refuse()
    return other


@pytest.fixture
def tiles(library_of_tiles: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """The library in whose tiles nothing may go wrong."""
    yield library_of_tiles
    assert library_of_tiles.m1_emulated_fault() is None
    assert library_of_tiles.m1_emulated_configured() == 0  # every thread has released its own


def product(of: ctypes.CDLL, module: QuantizedLinear, x: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "library", lambda: of)
        found: Tensor = module(x)
    return found


def in_tiles(of: ctypes.CDLL, module: QuantizedLinear, x: Tensor) -> Tensor:
    before = of.m1_emulated_products()
    found = product(of, module, x)
    assert of.m1_emulated_products() > before
    return found


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_give_the_bits_of_vectors_and_those_are_the_formulas(
    shape: tuple[int, int], spec: LinearSpec, tiles: ctypes.CDLL, refused: ctypes.CDLL
) -> None:
    module = build(shape, spec)
    for rows in ROWS:
        x = activations(rows, shape[1])
        found = in_tiles(tiles, module, x)
        assert_close(found, rounded(x, spec), module.dequantize(), SUMS * 4)
        assert torch.equal(found, module(x))
        assert torch.equal(found, product(refused, module, x))
        short = x.to(torch.bfloat16)
        assert torch.equal(in_tiles(tiles, module, short), module(short))
    assert refused.m1_emulated_products() == 0


@pytest.mark.parametrize("columns", [1, 31, 33, 97, 200])
def test_rows_of_bytes_may_have_any_length_in_tiles(columns: int, tiles: ctypes.CDLL) -> None:
    module = build((37, columns), INT8)
    for rows in (9, 19, 33):
        x = activations(rows, columns)
        found = in_tiles(tiles, module, x)
        assert_close(found, rounded(x, INT8), module.dequantize(), SUMS * 4)
        assert torch.equal(found, module(x))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fewer_rows_than_half_a_tile_are_left_to_vectors(
    spec: LinearSpec, tiles: ctypes.CDLL
) -> None:
    module, x = build((70, 256), spec), activations(16, 256)
    many = in_tiles(tiles, module, x)
    for rows in (1, 4, 5, 8):
        before = tiles.m1_emulated_products()
        found = product(tiles, module, x[:rows])
        assert tiles.m1_emulated_products() == before
        assert torch.equal(found, module(x[:rows]))
        if rows > 4:  # a row does not depend on its neighbours, nor on what multiplied it
            assert torch.equal(found, many[:rows])


@pytest.mark.parametrize("spec", SPECS[:4], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_thread_has_tiles_of_its_own(
    spec: LinearSpec, threads: int, tiles: ctypes.CDLL
) -> None:
    module, x = build((4200, 256), spec), activations(33, 256)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(in_tiles(tiles, module, x), module(x))
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, 1e-42, 0.0])
def test_a_row_of_no_numbers_does_not_spoil_its_neighbours(
    spec: LinearSpec, value: float, tiles: ctypes.CDLL
) -> None:
    module, x = build((40, 256), spec), activations(50, 256)
    expected = in_tiles(tiles, module, x)
    strange = [0, 15, 16, 40, 49]
    others = [row for row in range(50) if row not in strange]
    x[strange, 100] = value
    x[49] = value
    found = in_tiles(tiles, module, x)
    assert torch.equal(found[others], expected[others])
    assert torch.equal(found.nan_to_num(), module(x).nan_to_num())
    if not torch.tensor(value).isfinite():
        assert found[strange].isnan().all()


def test_the_self_test_passes_through_the_tiles(tiles: ctypes.CDLL, refused: ctypes.CDLL) -> None:
    before = tiles.m1_emulated_products()
    assert tiles.m1_self_test() == 1
    assert tiles.m1_emulated_products() > before
    assert tiles.m1_instructions() == b"AVX-512 and AMX"
    assert refused.m1_self_test() == 1
    assert refused.m1_emulated_products() == 0
    assert refused.m1_instructions() == b"AVX-512"
    assert tiles.m1_emulated_asked() == refused.m1_emulated_asked() == 1  # the system, once


def shapes(*tiles: tuple[int, int], palette: int = 1, start: int = 0, reserved: int = 0) -> bytes:
    """What LDTILECFG reads: tiles of so many rows and bytes."""
    padded = [*tiles, *[(0, 0)] * (16 - len(tiles))]
    sizes = b"".join(size.to_bytes(2, "little") for _, size in padded)
    return bytes([palette, start, *[reserved] * 14]) + sizes + bytes(rows for rows, _ in padded)


@pytest.mark.parametrize(("m", "k", "n"), [(16, 16, 16), (16, 8, 16), (5, 3, 7), (1, 1, 1)])
def test_the_emulation_multiplies_signed_by_unsigned_bytes(
    m: int, k: int, n: int, tiles: ctypes.CDLL
) -> None:
    generator = torch.Generator().manual_seed(m)
    a = torch.randint(-128, 128, (m, 4 * k), generator=generator, dtype=torch.int8)
    b = torch.randint(0, 256, (4 * k, n), generator=generator, dtype=torch.uint8)
    a[0], b[:, 0] = -128, 255
    c = torch.randint(-9999, 9999, (m, n), generator=generator, dtype=torch.int32)
    fours = b.view(k, 4, n).transpose(1, 2).contiguous()  # of a column side by side
    tiles.m1_emulated_loadconfig(shapes((m, 4 * n), (m, 4 * k), (k, 4 * n)))
    for tile, tensor in enumerate((c, a, fours)):
        stride = ctypes.c_int64(tensor[0].nbytes)
        tiles.m1_emulated_load(tile, library.address(tensor), stride)
    tiles.m1_emulated_dot(0, 1, 2)
    found = torch.empty_like(c)
    tiles.m1_emulated_store(0, library.address(found), ctypes.c_int64(4 * n))
    tiles.m1_emulated_release()
    assert torch.equal(found, c + (a.int() @ b.int()))


@pytest.mark.parametrize(
    ("configured", "used", "fault"),
    [
        (shapes((16, 64), palette=2), (), "palette"),
        (shapes((16, 64), start=1), (), "start row"),
        (shapes((16, 64), reserved=1), (), "reserved"),
        (shapes((16, 0)), (), "without bytes"),
        (shapes((17, 64)), (), "too large"),
        (shapes((16, 68)), (), "too large"),
        (shapes(*[(16, 64)] * 9), (), "beyond"),
        (shapes((16, 64)), ("zero", 1), "zero: no such"),
        (shapes((16, 64)), ("dot", 0, 1, 2), "no such"),
        (shapes((16, 64), (16, 64)), ("dot", 0, 1, 1), "twice"),
        (shapes((16, 62), (16, 64), (16, 62)), ("dot", 0, 1, 2), "fours"),
        (shapes((15, 64), (16, 64), (16, 64)), ("dot", 0, 1, 2), "rows of c"),
        (shapes((16, 60), (16, 64), (16, 64)), ("dot", 0, 1, 2), "columns of c"),
        (shapes((16, 64), (16, 32), (16, 64)), ("dot", 0, 1, 2), "columns of a"),
        (None, ("zero", 0), "zero: no such"),
        (None, ("load", 0, None, 0), "load: no such"),
        (None, ("store", 0, None, 0), "store: no such"),
    ],
)
def test_the_emulation_is_as_strict_as_the_processor(
    configured: bytes | None, used: tuple[str | int | None, ...], fault: str, refused: ctypes.CDLL
) -> None:
    if configured is not None:
        refused.m1_emulated_loadconfig(configured)
    if used:
        assert refused.m1_emulated_fault() is None
        getattr(refused, f"m1_emulated_{used[0]}")(*used[1:])
    said = refused.m1_emulated_fault()
    refused.m1_emulated_release()
    assert said is not None
    assert fault in said.decode()
    assert refused.m1_emulated_configured() == 0


def compiled(flags: tuple[str, ...], source: Path, output: Path) -> str:
    """What the compiler complained of."""
    plain = [flag for flag in library.FAST if flag != "-shared"]
    command = [str(library._compiler()), *plain, *flags, "-c", str(source), "-o", str(output)]
    return library._run(command, output.parent)


@pytest.mark.parametrize("tile", ["8", "-1", "index"])
def test_a_tile_is_a_number_that_is_written_out(tile: str, tmp_path: Path) -> None:
    source, emulated = tmp_path / "tile.c", f'-DM1_EMULATED_TILES="{EMULATION}"'
    code = '#include "tiles.h"\nvoid zero(int index) {{ (void)index; tile_zero({}); }}\n'
    flags = ("-march=native", emulated, "-I", str(library.SOURCES))
    source.write_text(code.format("7"))
    assert compiled(flags, source, tmp_path / "tile.o") == ""
    source.write_text(code.format(tile))
    assert compiled(flags, source, tmp_path / "tile.o") != ""


AMX = ("-mamx-tile", "-mamx-int8")
needs_amx = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="AMX is used by Linux on x86-64",
)


def skip_unless_known(complaint: str, *flags: str) -> None:
    """Skip where the compiler complains of anything that is compiled so, not of the tiles."""
    with tempfile.TemporaryDirectory() as folder:
        if complaint and compiled(flags, library.SOURCES / "stream.c", Path(folder) / "stream.o"):
            pytest.skip(f"this compiler does not know {' '.join(flags)}: {complaint}")


@needs_amx
def test_the_real_instructions_are_compiled(tmp_path: Path) -> None:
    output, flags = tmp_path / "tiles.o", ("-march=sapphirerapids", *AMX)
    complaint = compiled(flags, library.SOURCES / "matmul_tiles.c", output)
    skip_unless_known(complaint, *flags)
    assert complaint == ""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump shows the instructions")
    said = subprocess.run(
        ["objdump", "-d", str(output)], capture_output=True, text=True, check=True
    )
    for name in ("ldtilecfg", "tilezero", "tileloadd", "tdpbsud", "tilestored", "tilerelease"):
        assert re.search(rf"\b{name}\b", said.stdout), name
    found = re.findall(r"tdpbsud +%tmm(\d),%tmm(\d),%tmm(\d)", said.stdout)
    of_w_x_and_sums = {("6", "4", "0"), ("7", "4", "1"), ("6", "5", "2"), ("7", "5", "3")}
    assert set(found) == of_w_x_and_sums


@needs_amx
@pytest.mark.skipif(
    any(" amx_tile" in line for line in library._processor()),
    reason="nothing traps on a processor that has AMX: its products are test_native_matmul.py's",
)
def test_the_real_instructions_give_the_right_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, compiler = tmp_path / "trapped.so", library._compiler()
    folders = ("-I", str(library.SOURCES), "-I", str(HERE))
    sources = [*library._sources(), HERE / "trapped_tiles.c"]
    monkeypatch.setattr(library, "_sources", lambda: sources)
    complaint = library._build(compiler, (*library.FLAGS[0], *AMX, *folders), built)
    skip_unless_known(complaint, "-march=native", *AMX)
    assert complaint == ""
    said = subprocess.run(  # the trap is for that process alone
        [sys.executable, "-I", "-c", TRAPPED, str(built)], capture_output=True, text=True
    )
    assert (said.returncode, said.stderr) == (0, "")
    right, products, fault, instructions = said.stdout.split(",")
    assert (right, fault, instructions.strip()) == ("1", "None", "AVX-512 and AMX")
    assert int(products) > 100
