"""Recipes: a mistake in one is named with its file, before anything is written."""

from pathlib import Path

import pytest

from m1local.errors import RecipeError
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe
from tests.damage import refused

RULE = '[[rules]]\nmatch = "*"\nformat = "int8"\n'
BAD_RECIPES = {
    "no TOML": ("method =", r"own.toml is no valid TOML: "),
    "another encoding": ('method = "\udcff"', r"own.toml is no valid TOML: "),
    "empty": ("", r"own.toml has no method; add one: rtn, hqq, gptq, refit"),
    "no method": (RULE, r"own.toml has no method; add one: rtn, hqq, gptq, refit"),
    "an unknown method": (f'method = "gptx"\n{RULE}', r"method is 'gptx'; known: rtn, "),
    "a method that is no text": (f"method = [1]\n{RULE}", r"method is \[1\]; known: rtn"),
    "an unknown key": (f'method = "rtn"\nbits = 4\n{RULE}', "unknown key 'bits'; a recipe has"),
    "no rules": ('method = "rtn"', r"own.toml has no \[\[rules\]\]"),
    "rules that are no list": ('method = "rtn"\nrules = "all"', r"own.toml has no \[\[rules\]\]"),
    "a rule that is no table": ('method = "rtn"\nrules = ["*"]', r'every rule needs match = "patt'),
    "a rule without match": (
        'method = "rtn"\n[[rules]]\nformat = "int8"',
        r'own.toml: every rule needs match = "pattern"',
    ),
    "a rule with an unknown key": (
        f'method = "rtn"\n{RULE}groupsize = 64',
        r"own.toml: unknown key 'groupsize' in the rule '\*'",
    ),
    "an unknown format": (
        'method = "rtn"\n[[rules]]\nmatch = "*"\nformat = "int2"',
        r"own.toml: the rule '\*' has format 'int2'; known: float, int8, int3, int4",
    ),
    "a group size that is no integer": (
        f'method = "rtn"\n{RULE}group_size = "64"',
        r"own.toml: group_size is '64', expected an integer",
    ),
    "a method that does not know the format": (
        f'method = "rtn"\n{RULE}method = "hqq"',
        r"own.toml: the rule '\*' has method 'hqq'; for int8 there is rtn.",
    ),
    "a rule's method that is no text": (
        f'method = "rtn"\n{RULE}method = {{}}',
        r"own.toml: the rule '\*' has method {}; for int8 there is rtn.",
    ),
    "no rule for a matrix": (
        'method = "rtn"\n[[rules]]\nmatch = "model.*"\nformat = "int8"',
        r'recipe own has no rule for lm_head; end it with a rule that matches "\*"',
    ),
    "a group size that does not divide": (
        'method = "rtn"\n[[rules]]\nmatch = "*proj"\nformat = "int4"\ngroup_size = 128\n' + RULE,
        r"own stores model.layers.0.self_attn.o_proj as int4, but groups of 128 do not divide its "
        r"64 columns. Choose another group size",
    ),
    "a group size that the format does not have": (
        'method = "rtn"\n[[rules]]\nmatch = "*proj"\nformat = "int4"\ngroup_size = 48\n' + RULE,
        r"but the group size is 48; int4 takes 32, 64 or 128. Choose another group size",
    ),
    "no group size where one is needed": (
        'method = "rtn"\n[[rules]]\nmatch = "*proj"\nformat = "int4"\n' + RULE,
        r"but the group size is None; int4 takes 32, 64 or 128. Choose another group size",
    ),
    "an embedding whose rows cannot be read": (
        'method = "rtn"\n[[rules]]\nmatch = "*"\nformat = "bnb-nf4"',
        r"model.embed_tokens as bnb-nf4, but an embedding's rows are read one by one",
    ),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_bad_recipe_is_refused_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    text, match = BAD_RECIPES[name]
    path = tmp_path / "own.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with refused(RecipeError, match):
        list(quantize_checkpoint(tiny_checkpoint, tmp_path / "out", Recipe.find(str(path))))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["int5", "", "../int8", "none", "int8.toml", "no/such.toml"])
def test_an_unknown_recipe_is_answered_with_those_there_are(name: str) -> None:
    shipped = "bnb-int8, bnb-nf4, fit, int4, int4-gptq, int8"
    match = rf"There is no recipe {name!r}. Shipped: {shipped}; or give the path"
    with refused(RecipeError, match):
        Recipe.find(name)
