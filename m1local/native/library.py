"""Compiles the C files beside this one for the very processor they run on, and loads the result.

What it is: one shared library, compiled once (some seconds), tried in a process of its own, and
kept in the user's folder under the hash of everything it follows from; what was not used for a
month is removed when another is made. What it is not: required;
whatever fails here leaves `library()` None, and torch does the work. Nothing is raised or printed;
`status()` says what is used, or why not and what would help.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock

import torch  # before the library: both then share one OpenMP, torch's
from torch import Tensor

from m1local import home
from m1local.errors import M1Error

SOURCES = Path(__file__).parent
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
SUFFIXES = (".dll", ".dylib", ".so", ".sha256")  # of all systems, the hash last
COMPILERS = {"win32": ("clang-cl", "cl", "gcc", "clang")}.get(sys.platform, ("cc", "gcc", "clang"))
HINTS = {
    "win32": "install the Build Tools for Visual Studio and start from their command prompt",
    "darwin": "install one with `xcode-select --install`",
}
HINT = HINTS.get(sys.platform, "install gcc or clang from your distribution (a package gcc)")
# Multiplying and adding stay two operations: equal results.
PLAIN = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared")
FAST = (*PLAIN, "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fvisibility=hidden")
# The first that works; whatever a compiler does not know makes it fail.
FLAGS = (
    (*FAST, "-march=native", "-fopenmp"),
    # AMX may be there and not work: an old compiler, or a virtual machine that does not enable it.
    (*FAST, "-march=native", "-mno-amx-tile", "-mno-amx-int8", "-fopenmp"),
    (*FAST, "-fopenmp"),
    (*FAST, "-march=native"),
    FAST,
    PLAIN,
)
MSVC_FLAGS = ("/nologo", "/std:c11", "/O2", "/fp:precise", "/LD")
MSVC_WIDE = {"AVX512": ("/arch:AVX512",), "AVX2": ("/arch:AVX2",)}
UNUSED_SECONDS = 30 * 24 * 3600
SECONDS = 120  # a compiler may take; it needs some
TRY = (
    "import ctypes, sys\n"
    "sys.exit(0 if ctypes.CDLL(sys.argv[1]).m1_self_test() == 1 else 'the self-test failed')\n"
)


@dataclass(frozen=True, slots=True)
class Status:
    """Whether the compiled library is in use."""

    active: bool
    text: str  # one line: by which compiler and for which instructions, or why not and what helps


class _UnusableError(Exception):
    """Why there is no library: one line."""


@cache
def _load_once() -> tuple[ctypes.CDLL | None, Status]:
    return load()


_lock = Lock()


def library() -> ctypes.CDLL | None:
    """The library, compiled if need be; None where it cannot be had."""
    with _lock:  # of several threads that need it first, one compiles
        return _load_once()[0]


def status() -> Status:
    """Whether there is a library, and what to say of it; compiles it if need be."""
    with _lock:
        return _load_once()[1]


def load() -> tuple[ctypes.CDLL | None, Status]:
    """Find the library of this source, compiler and processor, or make it."""
    try:
        compiler = _compiler()
        path = _folder() / f"{_key(compiler)}{SUFFIX}"
        found = _open(path) if _is_sound(path) else None
        if found is None:
            _make(compiler, path)
            found = _open(path)
            with suppress(OSError):  # another process may be removing the same
                _remove_unused(path.parent)
        if found is None:
            raise _UnusableError(f"What {compiler} made cannot be loaded; {HINT}.")
        with suppress(OSError):  # a folder that cannot be written is read all the same
            os.utime(_hash_path(path))  # says when it was used last
    except _UnusableError as error:
        return None, Status(False, str(error))
    except (M1Error, OSError) as error:
        return None, Status(False, f"Nothing compiled can be kept or read ({error}).")
    words = [_said_by(found, "m1_compiler"), "for", _said_by(found, "m1_instructions")]
    if not found.m1_has_openmp():
        words.append("without OpenMP")
    return found, Status(True, f"compiled by {' '.join(words)}")


def _folder() -> Path:
    folder = home.native()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _compiler() -> Path:
    if sys.platform == "darwin" and _run(["xcode-select", "-p"], Path()):
        # There is a `cc` all the same, which opens a window that offers to install one.
        raise _UnusableError(f"There is no C compiler; {HINT}.")
    for name in COMPILERS:
        if found := shutil.which(name):
            return Path(found)
    raise _UnusableError(f"There is no C compiler ({', '.join(COMPILERS)}) in PATH; {HINT}.")


def _sources() -> list[Path]:
    return sorted(SOURCES.glob("*.c"))


def _key(compiler: Path) -> str:
    """Of everything the library follows from; the compiler is not run for it."""
    digest = hashlib.sha256()
    for path in (*_sources(), *sorted(SOURCES.glob("*.h"))):
        digest.update(path.read_bytes())
    installed = compiler.resolve().stat()
    version = [str(compiler.resolve()), installed.st_size, installed.st_mtime_ns]
    digest.update(repr([version, list(_all_flags(compiler)), _processor()]).encode())
    return digest.hexdigest()[:32]


def _processor() -> list[str]:
    """Model and instructions of the processor, as far as the system tells."""
    found = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    wanted = ("model name", "flags", "CPU part", "Features")
    return found + sorted({line for line in lines if line.startswith(wanted)})


def _all_flags(compiler: Path) -> Iterator[tuple[str, ...]]:
    """Choices of flags, the best first."""
    if compiler.stem.lower() in ("cl", "clang-cl"):
        wide = MSVC_WIDE.get(torch.backends.cpu.get_cpu_capability(), ())
        yield from ((*MSVC_FLAGS, *wide, "/openmp"), (*MSVC_FLAGS, *wide), MSVC_FLAGS)
    else:
        yield from FLAGS


def _build(compiler: Path, flags: tuple[str, ...], output: Path) -> str:
    """Compile the sources, several at once, to a library; what was complained of last, or ""."""
    folder, sources = output.parent, _sources()
    if flags[0] == MSVC_FLAGS[0]:
        return _run([str(compiler), *flags, *map(str, sources), f"/Fe:{output}"], folder)

    def compiled(source: Path) -> str:
        made = folder / f"{source.stem}.o"
        return _run([str(compiler), *flags, "-c", "-o", str(made), str(source)], folder)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        said = next(filter(None, threads.map(compiled, sources)), "")
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    math = [] if sys.platform == "win32" else ["-lm"]
    return said or _run([str(compiler), *flags, "-o", str(output), *objects, *math], folder)


def _make(compiler: Path, path: Path) -> None:
    """Compile to `path`; several processes may do so at once, and each leaves a whole file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built, said = Path(folder) / f"built{SUFFIX}", ""
        for flags in _all_flags(compiler):
            said = _build(compiler, flags, built)
            said = said or _run([sys.executable, "-I", "-c", TRY, str(built)], built.parent)
            if not said:
                break
        else:
            raise _UnusableError(f"{compiler} compiles nothing that works ({said}); {HINT}.")
        # The hash first: a library without its own is not loaded.
        recorded = Path(folder) / "recorded"
        recorded.write_text(hashlib.sha256(built.read_bytes()).hexdigest(), encoding="ascii")
        os.replace(recorded, _hash_path(path))
        os.replace(built, path)


def _remove_unused(folder: Path) -> None:
    """Delete builds that nothing has loaded for a month; one that is loaded now may resist."""
    stems = {path.stem for path in folder.iterdir() if path.suffix in SUFFIXES}
    for stem in stems:
        parts = [folder / f"{stem}{suffix}" for suffix in SUFFIXES]
        used = max((path.stat().st_mtime for path in parts if path.exists()), default=0.0)
        if time.time() - used > UNUSED_SECONDS:
            with suppress(OSError):  # Windows keeps a loaded library; its hash then stays, too
                for path in parts:
                    path.unlink(missing_ok=True)


def _run(command: list[str], folder: Path) -> str:
    """Run a command; what it complained of last, or "" where it ended well."""
    try:
        ended = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if not ended.returncode:
        return ""
    said = (ended.stderr or ended.stdout).decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"{Path(command[0]).name} ended with {ended.returncode}"


def _hash_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_sound(path: Path) -> bool:
    """Whether the library is there and as it was made: loading a cut one kills the process."""
    try:
        recorded = _hash_path(path).read_text(encoding="ascii", errors="replace").strip()
        return hashlib.sha256(path.read_bytes()).hexdigest() == recorded
    except OSError:
        return False


def _open(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _said_by(found: ctypes.CDLL, function: str) -> str:
    call = getattr(found, function)
    call.restype = ctypes.c_char_p
    said: bytes = call()
    return said.decode()


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's values begin; NULL for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
