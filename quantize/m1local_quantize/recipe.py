"""Recipes: which matrix is stored how, and by which method its values are chosen.

What it is: a TOML file read strictly; the shipped ones are data in recipes/. What it is not: code;
a recipe cannot compute anything.

    method = "refit"          # see m1local_quantize.methods; for the formats it knows, else "rtn"
    [[rules]]                 # the first rule that matches a module's name decides
    match = "lm_head"         # as in fnmatch: * stands for anything
    format = "int8"           # see m1local.formats; "float" keeps a matrix as it is
    [[rules]]
    match = "*"
    format = "int4"
    group_size = 64
    method = "hqq"            # if this rule's is another

Instead of a last rule for all there may be a list of formats, of which the best is chosen for each
matrix that no rule matches, once a size is given (fit.py):

    fit = ["int3/64", "int4/64", "int8"]          # format/group size
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from m1local.errors import RecipeError
from m1local.formats import FORMATS, GROUPED, LinearSpec
from m1local_quantize.methods import METHODS, method_for

FOLDER = Path(__file__).parent / "recipes"
FITTED = GROUPED | {"int8"}  # what `fit` may choose from
RULE_KEYS = {"match", "format", "group_size", "method"}


@dataclass(frozen=True, slots=True)
class Rule:
    """Matrices whose name fits `pattern` are stored as `spec`, with values by `method`."""

    pattern: str
    spec: LinearSpec
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to do with each matrix of a model."""

    name: str
    method: str
    rules: tuple[Rule, ...]
    candidates: tuple[LinearSpec, ...] = ()  # for what no rule matches: see fit.py

    def closed_rule(self, module_name: str) -> Rule | None:
        """What is done with the matrix `module_name`; None when no rule matches."""
        matching = (rule for rule in self.rules if fnmatchcase(module_name, rule.pattern))
        return next(matching, None)

    def rule_for(self, module_name: str) -> Rule:
        """What is done with the matrix `module_name`; raises RecipeError when no rule matches."""
        rule = self.closed_rule(module_name)
        if rule is not None:
            return rule
        self.check_closed()
        raise RecipeError(
            f"The recipe {self.name} has no rule for {module_name}; end it with a rule that "
            'matches "*".'
        )

    def check_closed(self) -> None:
        """Raise RecipeError where formats are still to be chosen for a size."""
        if self.candidates:
            raise RecipeError(
                f"The recipe {self.name} chooses formats for a size: give `m1 run` or "
                "`m1 quantize` one with --budget 7GiB, or a device's with --for 8GB."
            )

    @classmethod
    def find(cls, name_or_path: str) -> Self:
        """A shipped recipe by name, or one of your own by the path of its .toml file."""
        path = Path(name_or_path) if name_or_path.endswith(".toml") else FOLDER / "none"
        if not name_or_path.endswith(".toml") and name_or_path in shipped_recipes():
            path = FOLDER / f"{name_or_path}.toml"
        if not path.is_file():
            raise RecipeError(
                f"There is no recipe {name_or_path!r}. Shipped: {', '.join(shipped_recipes())}; "
                "or give the path of a .toml file."
            )
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"{path} is no valid TOML: {error}.") from error
        return cls._from_dict(path.stem, raw, str(path))

    @classmethod
    def _from_dict(cls, name: str, raw: Mapping[str, Any], where: str) -> Self:
        unknown = raw.keys() - {"method", "rules", "fit"}
        if unknown:
            raise RecipeError(
                f"{where}: unknown key {min(unknown)!r}; a recipe has method, rules, fit."
            )
        method = raw.get("method")
        if method is None:
            raise RecipeError(f"{where} has no method; add one: {', '.join(METHODS)}.")
        if not isinstance(method, str) or method not in METHODS:
            raise RecipeError(f"{where}: method is {method!r}; known: {', '.join(METHODS)}.")
        rules, candidates = raw.get("rules", []), _candidates(raw.get("fit", []), where)
        if not isinstance(rules, list) or not (rules or candidates):
            raise RecipeError(f"{where} has no [[rules]].")
        return cls(
            name=name,
            method=method,
            rules=tuple(_rule(rule, method, where) for rule in rules),
            candidates=candidates,
        )


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _candidates(raw: Any, where: str) -> tuple[LinearSpec, ...]:
    if not isinstance(raw, list) or not all(isinstance(text, str) for text in raw):
        raise RecipeError(f'{where}: fit is {raw!r}, expected a list such as ["int4/64", "int8"].')
    found = []
    for text in raw:
        name, _, size = text.partition("/")
        has_size = "/" in text
        if name not in FITTED or has_size != (name in GROUPED) or has_size != size.isdecimal():
            raise RecipeError(
                f"{where}: fit names {text!r}; a candidate is int8, or one of "
                "int3 to int6 with /32, /64 or /128 for its group size."
            )
        found.append(LinearSpec(name, int(size) if size else None))
    return tuple(found)


def _rule(raw: Any, method: str, where: str) -> Rule:
    if not isinstance(raw, dict) or not isinstance(raw.get("match"), str):
        raise RecipeError(f'{where}: every rule needs match = "pattern".')
    unknown = raw.keys() - RULE_KEYS
    if unknown:
        raise RecipeError(f"{where}: unknown key {min(unknown)!r} in the rule {raw['match']!r}.")
    known = ["float", *FORMATS]
    if raw.get("format") not in known:
        raise RecipeError(
            f"{where}: the rule {raw['match']!r} has format {raw.get('format')!r}; known: "
            f"{', '.join(known)}."
        )
    group_size = raw.get("group_size")
    if group_size is not None and not isinstance(group_size, int):
        raise RecipeError(f"{where}: group_size is {group_size!r}, expected an integer.")
    if group_size is not None and raw["format"] not in GROUPED:
        raise RecipeError(
            f"{where}: the rule {raw['match']!r} has a group_size, but {raw['format']} has no "
            "groups; remove it."
        )
    spec = LinearSpec(raw["format"], group_size)
    own = raw.get("method")
    if own is None:
        return Rule(raw["match"], spec, method_for(method, spec))
    if not isinstance(own, str) or own not in METHODS or spec.format not in METHODS[own].formats:
        fitting = [name for name, known in METHODS.items() if spec.format in known.formats]
        raise RecipeError(
            f"{where}: the rule {raw['match']!r} has method {own!r}; for {spec.format} there is "
            f"{', '.join(fitting) or 'none'}."
        )
    return Rule(raw["match"], spec, own)
