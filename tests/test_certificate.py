"""The quality certificate: the same figures as two whole models give, on a text that is checked."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from m1local.checkpoint import load_model
from m1local.errors import CalibrationError, CheckpointError
from m1local.manifest import CheckpointManifest
from m1local.tokenizer import M1Tokenizer
from m1local_app import conversing
from m1local_app.cli import cli
from m1local_app.terminal import Terminal
from m1local_quantize import certificate, stream
from m1local_quantize.certificate import StageMeasured, certify
from m1local_quantize.evaluate import Divergence, Sample, compare
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe, shipped_recipes
from m1local_quantize.source import Source
from m1local_quantize.stream import Stream
from m1local_quantize.text import SHIPPED, Text
from tests.conftest import TINY, write_checkpoint
from tests.damage import refused
from tests.test_pipeline import bytes_of

RECIPES = [name for name in shipped_recipes() if name != "fit"]  # which needs a size


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("certified")
    for recipe in RECIPES:
        list(quantize_checkpoint(tiny_checkpoint, folder / recipe, Recipe.find(recipe)))
    return {recipe: folder / recipe for recipe in RECIPES}


def samples(source: Path) -> tuple[Sample, ...]:
    return Source.open(source).read_text(SHIPPED).samples


@pytest.mark.parametrize("recipe", RECIPES)
def test_layer_by_layer_gives_what_two_whole_models_give(
    checkpoints: dict[str, Path],
    tiny_checkpoint: Path,
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(certificate, "ROWS_OF_LOGITS", 23)  # no divisor of any length
    monkeypatch.setattr(stream, "ROWS_OF_HEAD", 100)
    reference = load_model(tiny_checkpoint, dtype=torch.float32)
    model = load_model(checkpoints[recipe], dtype=torch.float32)
    text = Source.open(tiny_checkpoint).read_text(SHIPPED)
    whole = compare(reference, model, text.samples)
    manifest = CheckpointManifest.read(checkpoints[recipe])
    *progress, found = certify(
        Source.open(tiny_checkpoint), checkpoints[recipe], manifest.linears, text
    )
    assert isinstance(found, Divergence)
    assert asdict(found) == pytest.approx(asdict(whole), rel=1e-4)
    assert progress == [StageMeasured(done, 6) for done in range(1, 7)]
    assert manifest.certificate is not None
    for name, value in asdict(found).items():
        assert manifest.certificate[name] == pytest.approx(value, rel=1e-4)
    assert manifest.certificate["text"] == "medical.jsonl"


def test_a_checkpoint_that_loses_nothing_has_no_divergence(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "same.toml"
    recipe.write_text('method = "rtn"\n[[rules]]\nmatch = "*"\nformat = "float"\n')
    list(quantize_checkpoint(tiny_checkpoint, tmp_path / "same", Recipe.find(str(recipe))))
    found = CheckpointManifest.read(tmp_path / "same").certificate
    assert found is not None
    # The head's rows were normalized and rounded to 16 bits again.
    assert float(found["mean_kl"]) < 1e-4
    assert float(found["top1_agreement"]) > 0.97


def test_one_layer_at_a_time_is_loaded(
    checkpoints: dict[str, Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Source.open(tiny_checkpoint)
    passing = Stream.of_source(opened, samples(tiny_checkpoint))
    for _ in range(6):
        passing.advance()
        assert all(p.is_meta for p in passing._model.model.layers.parameters())
    assert passing.logits(0, slice(0, 3)).shape == (3, 512)
    assert passing._model.lm_head.weight.is_meta  # never whole in 32 bits


def test_the_terminal_says_at_the_start_what_quantizing_has_cost(
    checkpoints: dict[str, Path],
    tiny_checkpoint: Path,
    m1_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Terminal, "run", lambda *_: None)
    monkeypatch.setattr(conversing, "_piped_text", lambda: None)
    quantized = CliRunner().invoke(cli, ["chat", str(checkpoints["int4"])])
    manifest = CheckpointManifest.read(checkpoints["int4"])
    assert manifest.certificate is not None
    expected = f"KL divergence {manifest.certificate['mean_kl']:.4f}"
    assert "against the original: same top token" in quantized.stderr
    assert expected in quantized.stderr
    original = CliRunner().invoke(cli, ["chat", str(tiny_checkpoint)])
    assert "not medical advice" in original.stderr
    assert "against the original" not in original.stderr


def test_without_certification_there_is_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    list(quantize_checkpoint(tiny_checkpoint, tmp_path / "q", Recipe.find("int8"), text=None))
    assert CheckpointManifest.read(tmp_path / "q").certificate is None
    result = CliRunner().invoke(cli, ["show", str(tmp_path / "q")])
    assert "not measured" in result.stdout


def test_another_text_is_named_in_the_manifest(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("The heart pumps blood through the body. " * 40)
    list(quantize_checkpoint(tiny_checkpoint, tmp_path / "q", Recipe.find("int8"), text=text))
    found = CheckpointManifest.read(tmp_path / "q").certificate
    assert found is not None
    assert found["text"] == "own.txt"


def test_a_damaged_certificate_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    raw = json.loads((checkpoints["int8"] / "m1local.json").read_text())
    for damage in ("high", {"text": "x"}, raw["certificate"] | {"mean_kl": "low"}):
        (tmp_path / "m1local.json").write_text(json.dumps(raw | {"certificate": damage}))
        with refused(CheckpointError, "m1local.json is malformed"):
            CheckpointManifest.read(tmp_path)


BAD_TEXTS = {
    "empty": (b"", "has only 0 tokens"),
    "too short": (b"Yes.", r"has only \d+ tokens to judge"),
    "binary": (b"\x00\x01\x02" * 99, "is a binary file"),
    "no text": (b"\xff\xfe" * 99, "is no UTF-8 text"),
}
BAD_LINES = {
    "no JSON": ("not json", "line 2: expected"),
    "a list": ("[1]", "line 2: expected"),
    "no answer": ('{"question": "What?"}', "line 2: expected .*no text under the key answer"),
    "an answer that is no text": ('{"answer": 3}', "line 2: expected"),
    "a question that is no text": ('{"question": [], "answer": "x"}', "line 2: expected"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_of_no_use_is_refused_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    content, match = BAD_TEXTS[name]
    text = tmp_path / "own.txt"
    text.write_bytes(content)
    with refused(CalibrationError, match):
        list(quantize_checkpoint(tiny_checkpoint, tmp_path / "q", Recipe.find("int8"), text=text))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(
    tokenizer: M1Tokenizer, tmp_path: Path, name: str
) -> None:
    line, match = BAD_LINES[name]
    text = tmp_path / "own.jsonl"
    text.write_text(f'{{"text": "fine"}}\n{line}\n')
    with refused(CalibrationError, match):
        Text.read(text, tokenizer, longest=128)


def test_a_missing_text_is_named(tokenizer: M1Tokenizer, tmp_path: Path) -> None:
    with refused(CalibrationError, r"none.txt cannot be read \(No such file"):
        Text.read(tmp_path / "none.txt", tokenizer, longest=128)


def test_answers_are_judged_given_their_questions(tokenizer: M1Tokenizer) -> None:
    text = Text.read(SHIPPED, tokenizer, longest=512)
    assert len(text.samples) == 4  # this tokenizer knows few Chinese characters but as bytes
    assistant = tokenizer.marker("assistant")
    for sample in text.samples:
        assert sample.token_ids[sample.first_judged - 1] == assistant
    raw = Text.read(SHIPPED, tokenizer, longest=512, chat=False)
    assert all(assistant not in sample.token_ids for sample in raw.samples)
    short = Text.read(SHIPPED, tokenizer, longest=200)
    assert max(len(sample.token_ids) for sample in short.samples) <= 200


def test_verify_says_whole_or_names_the_damaged_file(
    checkpoints: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    good = CliRunner().invoke(cli, ["verify", str(checkpoints["int4"])])
    assert good.exit_code == 0
    assert "is whole" in good.stdout
    folder = tmp_path / "q"
    list(quantize_checkpoint(tiny_checkpoint, folder, Recipe.find("int4"), text=None))
    weights = folder / "model.safetensors"
    content, status = bytearray(weights.read_bytes()), weights.stat()
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that only a hash can tell
    load_model(folder)
    bad = CliRunner().invoke(cli, ["verify", str(folder)])
    assert bad.exit_code == 1
    assert "model.safetensors is damaged" in bad.stderr


def test_eval_says_perplexity_and_divergence(
    checkpoints: dict[str, Path], tiny_checkpoint: Path
) -> None:
    before = bytes_of(checkpoints["int8"])
    arguments = ["eval", "kld", str(checkpoints["int8"]), "--source", str(tiny_checkpoint)]
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 0
    assert "KL divergence 0.0" in found.stdout
    assert "medical.jsonl" in found.stdout
    ppl = CliRunner().invoke(cli, ["eval", "ppl", str(checkpoints["int8"])])
    assert ppl.stdout.startswith("perplexity ")
    without = CliRunner().invoke(cli, arguments[:3])
    assert without.exit_code == 2
    assert "--source" in without.stderr
    assert bytes_of(checkpoints["int8"]) == before


def test_eval_refuses_an_original_of_another_shape(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    write_checkpoint(
        tmp_path / "other", TINY | {"num_hidden_layers": 2, "sliding_window_layers": [1]}
    )
    arguments = ["eval", "kld", str(checkpoints["int8"]), "--source", str(tmp_path / "other")]
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 1
    assert "not the original" in found.stderr
