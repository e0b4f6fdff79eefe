"""The model card: what the licence asks for is in it, and nothing that is not so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m1local import home
from m1local.formats import LinearSpec
from m1local_quantize.card import AGREEMENT, Facts, Origin, card, format_shares
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe
from tests.damage import change_json

INSTRUCT = "baichuan-inc/Baichuan-M1-14B-Instruct"


@pytest.fixture(scope="module")
def facts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    folder = tmp_path_factory.mktemp("card") / "q"
    list(quantize_checkpoint(tiny_checkpoint, folder, Recipe.find("int4")))
    return Facts.of(folder, "me/mine")


def of_baichuan(facts: Facts, source: str = INSTRUCT) -> Facts:
    manifest = replace(facts.manifest, source=source, source_revision="c" * 40)
    return replace(facts, manifest=manifest, origin=Origin.BAICHUAN)


def front_matter(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    pairs = (line.split(": ", 1) for line in matter.splitlines())
    return {name: json.loads(value) for name, value in pairs}


def test_a_derivative_of_baichuans_says_what_its_licence_asks_for(facts: Facts) -> None:
    text = card(of_baichuan(facts))
    assert "\n# mine · Baichuan Inside\n" in text
    assert f"`{INSTRUCT}` at commit `{'c' * 40}`, **modified**: quantized" in text
    assert "Baichuan-M1-14B 模型社区许可协议" in text
    assert "no commercial use without the written permission" in text
    assert "opensource.contact@baichuan-inc.com" in text
    assert "adds a copy of the agreement" in text
    assert f"The agreement: {AGREEMENT}" in text
    assert "## Changes made to the original" in text
    assert "Not a doctor" in text
    assert "no medical advice" in text
    assert "m1 run me/mine" in text


def test_the_front_matter_is_what_the_hub_reads(facts: Facts) -> None:
    assert front_matter(card(of_baichuan(facts))) == {
        "license": "other",
        "license_name": "baichuan-m1-14b-community-license",
        "license_link": AGREEMENT,
        "base_model": INSTRUCT,
        "base_model_relation": "quantized",
        "language": ["en", "zh"],
        "library_name": "m1local",
        "pipeline_tag": "text-generation",
        "tags": ["m1local", "baichuan_m1", "medical", "quantized", "int4"],
    }


def test_the_front_matter_is_yaml_whatever_the_source_is_called(facts: Facts) -> None:
    yaml = pytest.importorskip("yaml")
    odd = of_baichuan(facts, 'me/a: "b" # c')
    _, matter, _ = card(odd).split("---\n", 2)
    assert yaml.safe_load(matter)["base_model"] == 'me/a: "b" # c'


@pytest.mark.parametrize(
    ("source", "base"),
    [("Baichuan-M1-14B-Base", "baichuan-inc/Baichuan-M1-14B-Base"), ("my-Baichuan-M1", None)],
)
def test_a_folders_name_is_a_base_model_only_where_the_maker_has_one_of_that_name(
    facts: Facts, source: str, base: str | None
) -> None:
    found = front_matter(card(of_baichuan(facts, source)))
    assert found.get("base_model") == base
    assert ("base_model_relation" in found) == (base is not None)


def test_the_numbers_are_those_of_the_manifest(facts: Facts) -> None:
    text = card(facts)
    found = facts.manifest.certificate
    assert found is not None
    assert f"on {found['tokens']:,} tokens of `{found['text']}`" in text
    assert f"| KL divergence, mean | {found['mean_kl']:.4f} |" in text
    assert f"| same top token | {float(found['top1_agreement']):.1%} |" in text
    weights = sum(r.nbytes for n, r in facts.manifest.files.items() if n.endswith(".safetensors"))
    parameters = 512 * 64 * 2 + 64 + sum(_layer(i) for i in range(4))
    assert f"{parameters:,} parameters" in text
    assert f"{8 * weights / parameters:.2f} bits per weight" in text
    assert "The embedding is `int8`, the head `int8`." in text
    assert "Not measured" not in text
    unmeasured = replace(facts, manifest=replace(facts.manifest, certificate=None))
    assert "Not measured" in card(unmeasured)


def _layer(number: int) -> int:
    """Parameters of a layer of the tiny model."""
    heads, kv_heads = (8, 4) if number in (1, 3) else (4, 2)
    head_dim = 64 // heads
    attention = (heads + 2 * kv_heads) * head_dim * 64 + 64 * 64
    return attention + 2 * 2 * kv_heads + 3 * 64 * 128 + 2 * 64


def test_the_shares_are_of_weights_and_sum_to_all(facts: Facts) -> None:
    shares = format_shares(facts.manifest, facts.config)
    assert {spec for spec, _, _ in shares} == {LinearSpec("int8"), LinearSpec("int4", 64)}
    assert sum(count for _, count, _ in shares) == len(facts.manifest.linears)
    assert sum(share for _, _, share in shares) == pytest.approx(1)
    assert [share for _, _, share in shares] == sorted((s for _, _, s in shares), reverse=True)


def test_the_demo_claims_nothing_of_baichuans(tmp_path: Path) -> None:
    list(quantize_checkpoint(home.DEMO, tmp_path / "q", Recipe.find("int8"), text=None))
    facts = Facts.of(tmp_path / "q", "me/demo")
    assert facts.origin is Origin.DEMO
    text = card(facts)
    assert "Baichuan Inside" not in text
    assert "Baichuan Intelligence" not in text
    assert front_matter(text)["license"] == "apache-2.0"
    assert "MedQuAD" in text
    assert "CC BY 4.0" in text


@pytest.mark.parametrize("changed", ["name", "dimensions"])
def test_baichuans_are_known_by_their_name_or_their_dimensions(
    facts: Facts, tiny_checkpoint: Path, tmp_path: Path, changed: str
) -> None:
    folder = tmp_path / "q"
    list(quantize_checkpoint(tiny_checkpoint, folder, Recipe.find("int8"), text=None))
    if changed == "name":
        change_json(folder / "m1local.json", lambda raw: raw.update(source="x/my-BAICHUAN-m1"))
    else:
        real = {"vocab_size": 133120, "hidden_size": 5120, "num_hidden_layers": 40}
        change_json(folder / "config.json", lambda raw: raw.update(real))
    assert Facts.of(folder, "me/mine").origin is Origin.BAICHUAN


def test_of_another_source_it_claims_nothing(facts: Facts) -> None:
    assert facts.origin is Origin.OTHER
    text = card(facts)
    assert "# mine\n" in text
    assert "which m1local does not know" in text
    assert front_matter(text)["license"] == "other"
    assert "license_link" not in front_matter(text)
    assert "base_model" not in front_matter(text)


def test_names_cannot_break_out_of_their_line(facts: Facts) -> None:
    odd = replace(facts.manifest, source="a`|\n# Free for all", recipe="r")
    text = card(replace(facts, manifest=odd))
    assert "\n# Free" not in text
    assert "`a # Free for all`" in text
