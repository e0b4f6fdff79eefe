"""What --timings says of a start: steps in their order, their sum, and the same answer."""

import re
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m1local_app.cli import cli
from m1local_app.timings import Timings


def test_every_second_is_part_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = Timings()
    clock = time.perf_counter()
    timings._last = clock
    for name, at in (("torch", 1.25), ("tokenizer", 1.25), ("weights", 12.0)):
        monkeypatch.setattr(time, "perf_counter", lambda at=at: clock + at)
        timings.done(name)
    command = timings.steps[0][1]
    assert command > 0  # this process began a while ago
    assert [name for name, _ in timings.steps] == ["command", "torch", "tokenizer", "weights"]
    assert [round(seconds, 3) for _, seconds in timings.steps[1:]] == [1.25, 0, 10.75]
    lines = timings.table().splitlines()
    assert lines[-1].endswith(f"{command + 12:.2f} s")
    assert len({len(line) for line in lines}) == 1  # aligned at the right


def test_a_start_is_broken_down_before_the_answer(tiny_checkpoint: Path) -> None:
    asked = ("chat", str(tiny_checkpoint), "-p", "hello", "--temp", "0", "-n", "4")
    result = CliRunner().invoke(cli, [*asked, "--timings"])
    assert result.exit_code == 0
    steps = re.findall(r"^(\S.*?) +\d+\.\d\d s$", result.stderr, re.MULTILINE)
    assert steps == [
        "Python and the command", "torch and the options", "compiled library, found or made",
        "tokenizer", "room for the context", "weights, mapped or moved",
        "conversation and history", "from the start of the process",
    ]  # fmt: skip
    assert "tokens/s, first after" in result.stderr
    assert result.stdout == CliRunner().invoke(cli, list(asked)).stdout
