"""The library is compiled where it can be; whatever is in the way, torch goes on alone."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m1local.native import library
from tests.conftest import ROOT, lend_library

DRIVER = Path(__file__).parent / "native_driver.c"
EMULATION = Path(__file__).parent / "emulated_tiles.h"
posix = pytest.mark.skipif(os.name == "nt", reason="scripts stand in for compilers")
needs_compiler = pytest.mark.skipif(library.library() is None, reason=library.status().text)
# What a fresh process says and makes.
REPORT = (
    "import hashlib, torch\n"
    "from m1local.formats import LinearSpec\n"
    "from m1local.native import library\n"
    "from m1local_quantize.methods import quantizer\n"
    "spec = LinearSpec('int4', 64)\n"
    "rows = torch.randn(9, 256, generator=torch.Generator().manual_seed(0)).bfloat16()\n"
    "found = quantizer('refit', spec)(rows, spec)\n"
    "digest = hashlib.sha256()\n"
    "for name in sorted(found):\n"
    "    digest.update(bytes(found[name].view(torch.uint8).flatten().tolist()))\n"
    "print(library.status().active, digest.hexdigest())\n"
)


def begin(home: Path, path: str | None = None) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "M1_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "quantize")),
    }
    if path is not None:
        environment["PATH"] = path
    return subprocess.Popen(
        [sys.executable, "-c", REPORT], env=environment, stdout=subprocess.PIPE, text=True
    )


def end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Whether the library was active, and the hash of what was quantized."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    active, digest = said.split()
    return active, digest


def fake(folder: Path, script: str) -> str:
    """A folder for PATH in which `cc` is this script."""
    folder.mkdir()
    compiler = folder / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    return str(folder)


@pytest.fixture
def copier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is done at once: it hands out what was compiled before these tests."""
    if os.name == "posix" and (found := library.library()) is not None:
        script = f'while [ "$1" != -o ]; do shift; done; exec cp "{found._name}" "$2"'
        folder = fake(tmp_path / "copier", script)
        monkeypatch.setenv("PATH", os.pathsep.join((folder, os.environ["PATH"])))


def made() -> Path:
    """The library in M1_HOME, made but not loaded: a path is mapped once in a process."""
    compiler = library._compiler()
    path = library._folder() / f"{library._key(compiler)}{library.SUFFIX}"
    library._make(compiler, path)
    assert library._is_sound(path)
    return path


def kept(home: Path) -> list[str]:
    return sorted(path.suffix for path in (home / "native").iterdir())


@needs_compiler
def test_it_is_compiled_once_and_says_by_what(m1_home: Path) -> None:
    found, status = library.load()
    assert found is not None
    assert found.m1_self_test() == 1
    assert status.active
    assert re.fullmatch(r"compiled by (gcc|clang|MSVC) \S+ for .+", status.text)
    (path,) = (m1_home / "native").glob(f"*{library.SUFFIX}")
    before = path.stat().st_mtime_ns
    library.load()
    assert path.stat().st_mtime_ns == before
    assert kept(m1_home) == sorted([".sha256", library.SUFFIX])


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "empty", "a bit", "no hash", "gone"])
def test_a_damaged_library_is_made_again(m1_home: Path, copier: None, damage: str) -> None:
    path = made()
    content = path.read_bytes()
    if damage == "no hash":
        path.with_suffix(".sha256").unlink()
    elif damage == "gone":
        path.unlink()
    else:
        flipped = bytes([content[5000] ^ 1])
        new = {"cut": content[:5000], "empty": b""}.get(
            damage, content[:5000] + flipped + content[5001:]
        )
        path.write_bytes(new)
    found, status = library.load()
    assert found is not None
    assert status.active
    assert library._is_sound(path)


@needs_compiler
def test_a_library_of_another_kind_with_the_right_hash_is_made_again(
    m1_home: Path, copier: None
) -> None:
    path, content = made(), b"no library"
    path.write_bytes(content)
    path.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())
    assert library._is_sound(path)
    assert library.load()[1].active
    assert path.read_bytes() != content


def aged(home: Path, stem: str, days: float, *suffixes: str) -> None:
    """A build that was used so many days ago."""
    (home / "native").mkdir(parents=True, exist_ok=True)
    for suffix in suffixes or (library.SUFFIX, ".sha256"):
        path = home / "native" / f"{stem}{suffix}"
        path.write_bytes(b"x")
        os.utime(path, (time.time() - days * 86400,) * 2)


@needs_compiler
def test_builds_that_nobody_uses_are_removed_when_another_is_made(
    m1_home: Path, copier: None
) -> None:
    aged(m1_home, "old", 31)
    aged(m1_home, "elsewhere", 31, ".dll", ".sha256")
    aged(m1_home, "orphan", 31, ".sha256")
    aged(m1_home, "recent", 29)
    aged(m1_home, "loaded-lately", 300, library.SUFFIX)
    aged(m1_home, "loaded-lately", 3, ".sha256")
    aged(m1_home, "notes", 300, ".txt")
    library.load()
    stems = {path.stem for path in (m1_home / "native").iterdir()}
    assert {"recent", "loaded-lately", "notes"} <= stems
    assert not stems & {"old", "elsewhere", "orphan"}
    assert len(stems) == 4


@needs_compiler
def test_loading_says_that_a_build_is_used_and_removes_nothing(m1_home: Path, copier: None) -> None:
    path = made()
    for each in (path, path.with_suffix(".sha256")):
        os.utime(each, (1, 1))
    aged(m1_home, "old", 31)
    library.load()
    assert (m1_home / "native" / "old.sha256").is_file()
    assert path.stat().st_mtime == 1
    assert path.with_suffix(".sha256").stat().st_mtime > time.time() - 3600
    aged(m1_home, "new", 0)
    library._remove_unused(path.parent)
    assert path.is_file()
    assert not (m1_home / "native" / "old.sha256").exists()


def test_a_loaded_library_that_cannot_be_deleted_keeps_its_hash(
    m1_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aged(m1_home, "old", 31)
    unlink = Path.unlink

    def windows(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == library.SUFFIX:
            raise PermissionError(13, "in use")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", windows)
    library._remove_unused(m1_home / "native")
    assert kept(m1_home) == sorted([".sha256", library.SUFFIX])


@needs_compiler
def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    processes = [begin(tmp_path) for _ in range(2)]
    found = [end(process) for process in processes]
    assert found[0] == found[1]
    assert found[0][0] == "True"
    assert kept(tmp_path) == sorted([".sha256", library.SUFFIX])
    assert end(begin(tmp_path)) == found[0]


@needs_compiler
def test_without_a_compiler_the_bytes_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    alone = end(begin(tmp_path / "home", path=str(tmp_path / "empty")))
    lend_library(tmp_path / "home")
    active, digest = end(begin(tmp_path / "home"))
    assert (active, alone) == ("True", ("False", digest))


def test_without_a_compiler_it_says_what_to_install(
    m1_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found, status = library.load()
    assert found is None
    assert not status.active
    assert status.text.startswith("There is no C compiler (")
    assert library.HINT in status.text
    assert "\n" not in status.text


@posix
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'some warning' >&2; echo 'cc: the disk is upset' >&2; exit 1", "the disk is upset"),
        ("exit 3", "cc ended with 3"),
        # It says that it compiled, and what it made is no library.
        ('while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"', "built"),
    ],
)
def test_a_compiler_that_fails_is_quoted(
    script: str, said: str, m1_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", fake(tmp_path / "bin", script))
    found, status = library.load()
    assert found is None
    assert "cc compiles nothing that works (" in status.text
    assert said in status.text
    assert "\n" not in status.text
    assert list((m1_home / "native").iterdir()) == []


@posix
@needs_compiler
@pytest.mark.parametrize(
    ("body", "said"),
    [("return 0;", "the self-test failed"), ("__builtin_trap();", "ended with -")],
)
def test_a_library_that_computes_wrongly_or_crashes_is_not_loaded(
    body: str, said: str, m1_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, other = library._compiler(), tmp_path / "other.c"
    other.write_text(f"int m1_self_test(void) {{ {body} }}\n")
    script = (
        'while [ "$1" != -o ]; do shift; done\n'
        f'PATH={os.environ["PATH"]} exec {real} -shared -fPIC -o "$2" {other}'
    )
    monkeypatch.setenv("PATH", fake(tmp_path / "bin", script))
    found, status = library.load()
    assert found is None
    assert said in status.text


@posix
@needs_compiler
def test_where_amx_does_not_work_the_library_is_compiled_without_it(
    m1_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = library.library()
    assert ready is not None
    broken, without = tmp_path / "broken.c", "*-march=native*-mno-amx-tile*-mno-amx-int8*"
    broken.write_text("int m1_self_test(void) { __builtin_trap(); }\n")
    said = tmp_path / "said"
    script = (
        f'echo "$*" >> {said}; flags="$*"; while [ "$1" != -o ]; do shift; done\n'
        f'case "$flags" in {without}) exec cp "{ready._name}" "$2";; esac\n'
        f'PATH={os.environ["PATH"]} exec {library._compiler()} -shared -fPIC -o "$2" {broken}'
    )
    monkeypatch.setenv(
        "PATH", os.pathsep.join((fake(tmp_path / "bin", script), "/usr/bin", "/bin"))
    )
    found, status = library.load()
    assert status.active, status.text
    assert found is not None
    lines = said.read_text().splitlines()
    assert all("-march=native" in line for line in lines)
    choices = ["-mno-amx-tile" in line for line in lines]
    assert choices == sorted(choices)  # first with AMX, then without, and nothing else
    assert set(choices) == {False, True}


def test_a_folder_that_cannot_be_written_is_no_error(m1_home: Path) -> None:
    m1_home.mkdir()
    (m1_home / "native").write_text("a file is in the way")
    if library.library() is not None:
        found, status = library.load()
        assert found is None
        assert status.text.startswith("Nothing compiled can be kept or read (")


def test_a_home_that_names_no_user_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M1_HOME", "~nobody-of-this-name/x")
    found, status = library.load()
    assert found is None
    assert not status.active


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torch_and_the_library_share_one_openmp(m1_home: Path) -> None:
    lend_library(m1_home)
    code = (
        "import re\n"
        "from pathlib import Path\n"
        "from m1local.native.library import library\n"
        "assert library() is not None\n"
        "maps = Path('/proc/self/maps').read_text()\n"
        "print(len(set(re.findall(r'\\S*/lib(?:gomp|omp|iomp5)\\S*', maps))))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "1", ran.stderr


# Plain C, and what this very processor has, with the tiles it may lack.
@needs_compiler
@pytest.mark.parametrize("wanted", [(), ("-march=native", f'-DM1_EMULATED_TILES="{EMULATION}"')])
def test_the_sanitizers_find_nothing(tmp_path: Path, wanted: tuple[str, ...]) -> None:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("the sanitizers are gcc's and clang's")
    program = tmp_path / "driver"
    flags = ["-std=c11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    exact = ["-ffp-contract=off", "-fno-strict-aliasing", "-I", str(library.SOURCES)]
    sources = [str(path) for path in (*library._sources(), DRIVER)]
    compiled = subprocess.run(  # without OpenMP, whose own memory the sanitizers would report
        [compiler, *flags, *wanted, *exact, "-o", str(program), *sources, "-lm"],
        capture_output=True,
        text=True,
    )
    if compiled.returncode and "san" in compiled.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "all right\n"), ran.stderr
