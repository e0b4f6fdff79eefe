"""A card that torch does not use is named, with the reason and what helps; otherwise nothing is."""

import io
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from m1local.cuda import driver
from m1local_app import answer_view, doctor, idle_card
from m1local_app.cli import cli
from m1local_app.language import speaking
from tests.conftest import ROOT

NAME = "NVIDIA GeForce RTX 4060"
DRIVER = """
int cuInit(unsigned flags) {{ return {init}; }}
int cuDeviceGetCount(int *count) {{ *count = {count}; return 0; }}
int cuDeviceGet(int *device, int ordinal) {{ *device = 41; return ordinal; }}
int cuDeviceGetName(char *name, int length, int device) {{
    const char *from = "{name}";
    if (device != 41) return 1;
    while (--length && (*name++ = *from++)) {{}}
    *name = 0;
    return 0;
}}
"""


def built(folder: Path, *, init: int = 0, count: int = 1, name: str = NAME) -> str:
    """A library that answers as NVIDIA's driver does."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER.format(init=init, count=count, name=name), encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


@pytest.mark.skipif(sys.platform == "win32", reason="builds a shared library as Unix does")
def test_the_driver_is_asked_for_its_first_card(tmp_path: Path) -> None:
    assert driver.first_card(built(tmp_path)) == NAME


@pytest.mark.skipif(sys.platform == "win32", reason="builds a shared library as Unix does")
def test_a_long_name_is_cut(tmp_path: Path) -> None:
    assert driver.first_card(built(tmp_path, name="x" * 300)) == "x" * 255


@pytest.mark.skipif(sys.platform == "win32", reason="builds a shared library as Unix does")
@pytest.mark.parametrize(("init", "count"), [(100, 1), (0, 0)], ids=["no device", "hidden"])
def test_a_driver_without_cards(tmp_path: Path, init: int, count: int) -> None:
    assert driver.first_card(built(tmp_path, init=init, count=count)) == ""


@pytest.mark.skipif(sys.platform == "win32", reason="builds a shared library as Unix does")
def test_a_driver_that_does_not_begin_is_no_silence(tmp_path: Path) -> None:
    assert "803" in driver.first_card(built(tmp_path, init=803))


def test_no_driver_or_another_library_of_its_name(tmp_path: Path) -> None:
    assert driver.first_card("no-such-library") == ""
    (tmp_path / "text").write_text("nothing", encoding="utf-8")
    assert driver.first_card(str(tmp_path / "text")) == ""


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that the driver knows; torch finds none."""
    monkeypatch.setattr(idle_card, "used_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(driver, "first_card", lambda: NAME)
    monkeypatch.setattr(torch.version, "cuda", None)
    idle_card.tell.cache_clear()


@pytest.mark.usefixtures("present")
def test_a_torch_without_cuda() -> None:
    found = idle_card.idle_card()
    assert found is not None
    assert (found.name, found.advice) == (NAME, idle_card.INSTALL)
    assert "without CUDA" in found.reason


@pytest.mark.usefixtures("present")
@pytest.mark.parametrize(
    ("said", "reason", "helps"),
    [
        (
            "The driver is too old (found version 12010). Update it from the URL",
            "The driver is too old (found version 12010)",
            "update NVIDIA's driver",
        ),
        ("CUDA unknown error\n - perhaps", "CUDA unknown error", "restart"),
    ],
)
def test_a_driver_that_torch_refuses_is_said_in_its_words(
    monkeypatch: pytest.MonkeyPatch, said: str, reason: str, helps: str
) -> None:
    def init() -> None:
        raise Exception(said)  # torch has a class of its own for some

    def properties(device: int) -> None:
        raise AssertionError("torch would begin to use the card")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    found = idle_card.idle_card()
    assert found is not None
    assert found.reason == reason
    assert found.advice.startswith(helps)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # by NVML
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    facts = {fact.name: fact for fact in doctor.of_machine(())}
    assert (facts["cuda"].value, facts["cuda"].advice) == (reason, found.advice)


@pytest.mark.usefixtures("present")
def test_a_card_that_torch_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GTX 1060")
    found = idle_card.idle_card()
    assert found is not None
    assert found.name == "NVIDIA GeForce GTX 1060"
    assert "no code for the card" in found.reason
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor, "used_device", lambda: torch.device("cpu"))
    used = next(fact for fact in doctor.of_machine(()) if fact.name == "used")
    assert used.advice == f"{found.reason}: {found.advice}"


@pytest.mark.usefixtures("present")
def test_a_card_in_use_or_none_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "first_card", lambda: "")
    assert idle_card.idle_card() is None
    monkeypatch.setattr(driver, "first_card", lambda: NAME)
    monkeypatch.setattr(idle_card, "used_device", lambda: torch.device("cuda"))
    assert idle_card.idle_card() is None


@pytest.mark.usefixtures("present")
def test_the_doctor_names_it_with_the_advice() -> None:
    facts = {fact.name: fact for fact in doctor.of_machine(())}
    assert facts["card"].value == NAME
    assert "without CUDA" in facts["cuda"].value
    assert facts["cuda"].advice == idle_card.INSTALL
    assert facts["used"].value == "cpu"


@pytest.mark.usefixtures("present")
def test_it_is_said_once_where_a_model_is_to_run(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, m1_home: Path
) -> None:
    def run(*options: str) -> str:
        idle_card.tell.cache_clear()
        asked = ("-p", "hello", "-n", "2", *options)
        return CliRunner().invoke(cli, ["chat", str(tiny_checkpoint), *asked]).stderr

    assert run().count(NAME) == 1
    assert NAME not in run("--gpu-layers", "0")
    planned = CliRunner().invoke(cli, ["plan", str(tiny_checkpoint), "--memory", "8GB"])
    assert NAME not in planned.stderr
    for command in (["plan"], ["bench", "-p", "4", "-n", "2", "-r", "1"]):
        idle_card.tell.cache_clear()
        asked = CliRunner().invoke(cli, [command[0], str(tiny_checkpoint), *command[1:]])
        assert asked.exit_code == 0
        assert NAME in asked.stderr
    idle_card.tell.cache_clear()
    ran = CliRunner().invoke(cli, ["run", str(tiny_checkpoint), "-p", "hello", "-n", "2"])
    assert ran.stderr.count(NAME) == 1
    assert ran.stderr.startswith(NAME)  # before anything is made
    idle_card.tell.cache_clear()
    with speaking("zh"):
        idle_card.tell()
        idle_card.tell()
    assert capsys.readouterr().err.count(f"未使用 {NAME}") == 1


@pytest.mark.usefixtures("present")
def test_the_command_is_one_line_that_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Console(file=io.StringIO(), width=40, force_terminal=True, highlight=False)
    monkeypatch.setattr(answer_view, "stderr_console", lambda: narrow)
    idle_card.tell()
    said = narrow.file.getvalue()  # type: ignore[attr-defined]
    assert idle_card.INSTALL in said
    assert len(said.splitlines()[0]) < 60  # the rest is wrapped by words


def test_what_is_to_be_installed_is_in_the_declared_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = next(each for each in project["dependencies"] if each.startswith("torch"))
    assert f'"{declared}"' in idle_card.INSTALL
