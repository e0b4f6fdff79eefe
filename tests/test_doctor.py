"""`m1 doctor`: what it finds, as lines and as JSON, and that it never ends in a traceback."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from m1local import __version__
from m1local.formats import FORMATS, format_class
from m1local_app import doctor
from m1local_app.cli import cli


def m1(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def test_it_says_what_this_machine_has(m1_home: Path) -> None:
    result = m1("doctor", "--offline")
    assert result.exit_code == 0
    for wanted in (__version__, torch.__version__, str(m1_home), "not asked", "GiB", "int4"):
        assert wanted in result.stdout
    # The C library may be compiled for the occasion; nothing else is written.
    assert {path.name for path in m1_home.glob("*")} <= {"native"}


def test_torch_is_named_with_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    facts = {fact.name: fact.value for fact in doctor.examine(offline=True)}
    assert facts["torch"] == "2.13.0+cu130"


def test_json_has_the_same_in_groups() -> None:
    found = json.loads(m1("doctor", "--offline", "--json").stdout)
    assert found["versions"]["m1local"] == __version__
    on_card = {"decode"} if torch.cuda.is_available() else set()
    assert found["kernels"].keys() == {"C library", *FORMATS} | on_card
    assert {"versions", "device", "kernels", "memory", "storage", "hub", "advice"} <= set(found)
    chinese = json.loads(m1("doctor", "--offline", "--json", "--lang", "zh").stdout)
    assert chinese.keys() == found.keys()


def test_a_hub_that_cannot_be_reached_is_an_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    found = json.loads(m1("doctor", "--json").stdout)
    assert found["hub"]["reachable"].startswith("no")
    assert any("HF_ENDPOINT" in advice for advice in found["advice"])


def test_every_format_says_what_multiplies_by_it() -> None:
    for name in FORMATS:
        said = format_class(name).kernel(torch.device("cpu"))
        assert said
        assert "\n" not in said
    assert "not meta" in format_class("int4").kernel(torch.device("meta"))


def test_a_broken_package_does_not_end_the_tour(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise OSError("a library is missing")

    monkeypatch.setattr("m1local.formats.bnb.bitsandbytes", broken)
    facts = doctor.examine(offline=True)
    assert any(fact.name == "bnb-nf4" and "a library is missing" in fact.value for fact in facts)


def test_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda device: 1 << 30)
    assert any("14B" in fact.advice for fact in doctor.examine(offline=True))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completion_is_there_for_every_shell(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: shell, raising=False)
    result = m1("--show-completion", shell)
    assert result.exit_code == 0
    assert "_M1_COMPLETE" in result.stdout or "COMPLETE" in result.stdout
