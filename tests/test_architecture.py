"""The structure holds: imports go one way, files stay small, the wheel is complete.

Runs on the source as text, and on a wheel installed elsewhere; nothing here knows what the code
computes.
"""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = {
    "m1local": ROOT / "m1local",
    "m1local_quantize": ROOT / "quantize/m1local_quantize",
    "m1local_app": ROOT / "app/m1local_app",
}
FRONT_ENDS = {"gradio", "typer", "rich"}
# What each package may not import: packages above it, and libraries that belong to another.
FORBIDDEN = {
    "m1local": {"m1local_quantize", "m1local_app", "optimum", *FRONT_ENDS},
    "m1local_quantize": {"m1local_app", *FRONT_ENDS},
    "m1local_app": {"optimum", "bitsandbytes", "safetensors"},
}
# Inside the runtime a module imports only from the lines above its own.
RUNTIME_ORDER = (
    ("errors",),
    ("folder", "home", "formats", "sums", "kv_store", "grouped"),
    ("native.library", "native.recycled", "native"),
    ("native.quantize", "native.matmul", "native.attention", "native.neighbours", "native.stream"),
    ("native.sha256",),
    ("config", "rope", "cuda", "cuda.card", "cuda.matrix", "cuda.transfer", "cuda.replay"),
    ("cuda.driver",),
    ("cuda.words", "cuda.support", "cuda.int4pack", "cuda.kept", "cuda.overlap"),
    ("cuda.tensor_core",),
    ("cuda.code_bytes", "cuda.activation", "cuda.ahead"),
    ("cuda.row_sums",),
    ("cuda.one_row",),
    ("cuda.trial", "cuda.rows"),
    ("cuda.products", "neighbours"),
    ("formats.slices",),
    ("formats.base", "formats.int4pack"),
    ("formats.groups", "formats.int8", "formats.bnb"),
    ("cache", "shards", "manifest"),
    ("cuda.fused", "cuda.embedding"),
    ("cuda.host_embedding",),
    ("cuda.heads",),
    ("cuda.attention", "cuda.prefill"),
    ("model", "workspace"),
    ("checkpoint", "tokenizer", "penalties", "loop_guard", "cuda.decode", "native.step"),
    ("sampling", "json_schema", "memory"),
    ("cuda.drawing", "advice"),
    ("generation_config", "text_stream", "context"),
    ("contexts", "lookup", "placement"),
    ("generate",),
    ("engine",),
    ("chat", "benchmark"),
)
FILE_LINES = 400
FUNCTION_LINES = 40


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of what a file imports when run; for `from a import b` both a and a.b."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way_between_packages(package: str) -> None:
    for path in python_files(PACKAGES[package]):
        roots = {name.partition(".")[0] for name in imported(path)}
        assert not roots & FORBIDDEN[package], f"{path} imports {roots & FORBIDDEN[package]}"


def test_imports_go_one_way_inside_the_runtime() -> None:
    level = {name: i for i, names in enumerate(RUNTIME_ORDER) for name in names}
    for path in python_files(PACKAGES["m1local"]):
        module = ".".join(path.relative_to(ROOT / "m1local").with_suffix("").parts)
        module = module.removesuffix(".__init__")
        if module == "__init__":
            continue
        assert module in level, f"{module} has no place in RUNTIME_ORDER"
        for name in imported(path):
            other = name.removeprefix("m1local.")
            if name.startswith("m1local.") and other in level and other != module:
                assert level[other] < level[module], f"{module} imports {other}"


def test_bitsandbytes_is_imported_in_one_file_only() -> None:
    users = {
        path.name
        for folder in PACKAGES.values()
        for path in python_files(folder)
        if "bitsandbytes" in {name.partition(".")[0] for name in imported(path)}
        or 'import_module("bitsandbytes' in path.read_text(encoding="utf-8")
    }
    assert users == {"bnb.py"}


def test_no_file_is_longer_than_the_limit() -> None:
    for path in python_files(*PACKAGES.values(), ROOT / "tests", ROOT / "tools", ROOT / "bench"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= FILE_LINES, f"{path.relative_to(ROOT)} has {lines} lines"


def test_no_function_is_longer_than_the_limit() -> None:
    for path in python_files(*PACKAGES.values(), ROOT / "tools", ROOT / "bench"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert lines <= FUNCTION_LINES, f"{path.name}:{node.name} has {lines} lines"


def test_only_the_front_ends_print() -> None:
    for package in ("m1local", "m1local_quantize"):
        for path in python_files(PACKAGES[package]):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                assert not (is_print and node.func.id == "print"), f"{path} prints"  # type: ignore[attr-defined]


def test_every_module_says_what_it_is_not() -> None:
    for path in python_files(*PACKAGES.values()):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert docstring, f"{path} has no docstring"
        if path.name not in ("__init__.py", "int8.py"):
            assert re.search(r"\bnot\b", docstring), f"{path} does not say what it is not"


HEAVY = ["torch", "gradio", "bitsandbytes", "safetensors", "sentencepiece", "numpy"]


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['m1', *{arguments!r}]\n"
        "from m1local_app.cli import cli\n"
        "try:\n    cli()\nexcept SystemExit as left:\n    assert not left.code, left.code\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "quantize", ROOT / "app"))
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from this source."""
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_packages_recipes_and_demo(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for needed in (
        "m1local/py.typed",
        "m1local/m1-tiny/model.safetensors",
        "m1local/m1-tiny/tokenizer.model",
        "m1local/m1-tiny/MODEL_CARD.md",
        "m1local/native/common.h",
        "m1local/native/groups.c",
        "m1local/native/matmul.c",
        "m1local/native/lanes.h",
        "m1local_quantize/recipes/int4.toml",
    ):
        assert needed in names


def test_the_wheel_stays_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        demo = sum(
            i.file_size for i in archive.infolist() if i.filename.startswith("m1local/m1-tiny")
        )
    assert demo <= 38_000_000


@pytest.mark.slow
def test_an_installed_wheel_answers_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    # What the project depends on comes from this environment, without the network.
    site = next(path for path in environment.rglob("site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    answered = subprocess.run(
        [str(scripts / "m1"), "run", "-p", "What is glaucoma?", "-n", "12", "--temp", "0"],
        cwd=elsewhere,
        env=variables | {"M1_HOME": str(tmp_path / "home")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(answered.stdout.split()) >= 3, answered
    assert "demo" in answered.stderr
