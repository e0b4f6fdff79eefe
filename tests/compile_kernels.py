"""Compile every kernel for every listed card, without one, at the dimensions of the 14B.

Run as a program (`python -m tests.compile_kernels`): it prints a JSON line for each kernel and
card. A process of its own, since kernels that were imported for the interpreter cannot be compiled.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

UNEVEN = (
    "parts",
    "packed_parts",
    "steps",
    "x_rows",
    "first",
    "start",
    "length",
)  # no multiples of 16
ONE_ROW = ("vector", "gated", "added")
THEN = {"then": ((("*u8", "i32", "i32", "i32"),) * 8, "i32")}
CAPABILITIES = (75, 80, 86, 89, 90, 120)


class Case(NamedTuple):
    """A kernel with the types of its arguments and what is fixed at compile time."""

    name: str
    kernel: Any
    types: dict[str, Any]  # a tuple's are one
    fixed: dict[str, int]
    warps: int


def cases(capability: int) -> Iterator[Case]:
    """Every kernel as its launcher would launch it on a card of `capability`."""
    from m1local.cuda.card import Card

    card = Card(divmod(capability, 10), 64)
    half = "*bf16" if capability >= 80 else "*fp16"
    yield from _products(card, half)
    yield from _neighbours(half, card.overlaps)
    yield from _rows(half)
    yield from _attention(card.tiles, half, card.overlaps, card.has_small_pieces)


def _stored() -> Iterator[tuple[str, dict[str, int], dict[str, str]]]:
    """Formats by name: what is fixed of a kind, and the types of a matrix's tensors."""
    from m1local.cuda import words

    kinds = {
        "int4": (words.INT4, 2, "*i32", "*bf16"),
        "int3": (words.INT3, 2, "*i16", "*bf16"),
        "int5": (words.INT5, 2, "*i32", "*bf16"),
        "int6": (words.INT6, 2, "*i32", "*bf16"),
        "int8": (words.INT8, 1, "*i64", "*fp32"),
        "nf4": (words.LEVELS, 2, "*i32", "*fp32"),
        "nf4-dq": (words.NESTED, 2, "*i32", "*u8"),
    }
    for name, (kind, per_group, codes, scales) in kinds.items():
        stored = {"codes": codes, "scales": scales, "zeros": scales}
        upper = {"int3": "*u8", "int5": "*u8", "int6": "*i16", "int4": scales}
        stored["levels"] = upper.get(name, "*fp32")
        stored["outer"] = "*fp32" if name == "nf4-dq" else scales
        fixed = {"KIND": kind.value, "PER_GROUP": per_group}
        is_tiled = name in ("int3", "int4", "int5", "int6")
        yield name, fixed | {"TILED": is_tiled}, stored
        if name == "int4":  # rows or groups that are no whole tiles
            yield "int4-plain", fixed | {"TILED": False}, stored


def _products(chosen: Any, half: str) -> Iterator[Case]:
    from m1local.cuda import card, one_row, products

    tiles = chosen.tiles

    for name, of_kind, stored in _stored():
        numbers = {"rows": "i32", "blocks": "i32", "steps": "i32"}
        vectors = (*stored.values(), "*i32" if name.startswith("nf4") else stored["scales"])
        fixed = of_kind | {"SMALL": chosen.has_small_pieces, "OVERLAP": chosen.overlaps}
        x, normed = {"x": ("*i32", "*fp32", "*fp32")}, {"SQUARES": 512}
        yield Case(
            f"vector {name}", one_row.vector_kernel,
            x | {"matrix": vectors, "out": "*fp32"} | THEN | numbers | {"eps": "fp32"},
            fixed | normed | _shape(tiles.vector), tiles.vector.warps,
        )  # fmt: skip
        if name in ("int4", "int6", "nf4-dq"):
            yield Case(
                f"gated {name}", one_row.gated_kernel,
                x | {"gate": vectors, "up": vectors} | _row(half) | THEN | numbers
                | {"eps": "fp32"},
                fixed | {"WHOLE": True} | normed | _shape(tiles.gated), tiles.gated.warps,
            )  # fmt: skip
        if name in ("int4", "int6", "nf4-dq"):
            yield Case(
                f"added {name}", one_row.added_kernel,
                x | {"matrix": vectors, "stream": "*fp32", "weight": half} | _row(half)
                | {"squares": "*fp32"} | THEN | numbers,
                fixed | _shape(tiles.added), tiles.added.warps,
            )  # fmt: skip
        if name in ("int3", "int5", "nf4"):  # several rows are decoded like int6 and nf4-dq
            continue
        for x_rows in (16, 64) if name == "int4" else (16,):
            if x_rows > tiles.most_rows:
                continue
            yield Case(
                f"tile {x_rows} {name}", products.tile_kernel,
                {"x": half} | stored | {"out": "*fp32", "x_rows": "i32"} | numbers,
                of_kind
                | {"X_ROWS": x_rows, "ROWS": tiles.tile_rows, "WORDS": tiles.tile_words},
                card.WARPS,
            )  # fmt: skip
        yield Case(
            f"expand {name}", products.expand_kernel,
            stored | {"out": half, "first": "i32", "rows": "i32", "blocks": "i32"},
            of_kind | {"ROWS": products.EXPANDED_ROWS, "WORDS": products.EXPANDED_WORDS},
            card.WARPS,
        )  # fmt: skip


def _shape(shape: Any) -> dict[str, int]:
    return {"GROUPS": shape.groups, "TURNS": shape.turns}


def _neighbours(half: str, overlap: bool) -> Iterator[Case]:
    from m1local.cuda import activation, card, embedding, fused
    from m1local.cuda.matrix import WORD

    row, fixed = _row(half), {"WHOLE": True, "OVERLAP": overlap}
    yield Case(
        "norm", fused.norm_kernel,
        {"x": "*fp32", "partial": "*fp32", "weight": half} | row
        | {"parts": "i32", "columns": "i32", "eps": "fp32"},
        {"BLOCK": 8192} | fixed, fused.NORM_WARPS,
    )  # fmt: skip
    yield Case(
        "round", activation.round_kernel, {"x": half} | row | {"columns": "i32"},
        {"N": activation.ROUNDED} | fixed, card.WARPS,
    )  # fmt: skip
    yield Case(
        "silu up", fused.silu_up_kernel,
        {"gate": "*fp32", "gate_parts": "i32", "up": "*fp32", "up_parts": "i32"} | row
        | {"columns": "i32"},
        {"BLOCK": fused.BLOCK} | fixed, card.WARPS,
    )  # fmt: skip
    fixed = {"OVERLAP": overlap}
    yield Case(
        "row", embedding.row_kernel,
        {"token_at": "*i64", "table": half, "out": "*fp32", "columns": "i32"},
        {"COLUMNS": embedding.COLUMNS} | fixed, card.WARPS,
    )  # fmt: skip
    for name, of_kind, stored in _stored():
        if not name.startswith("nf4"):
            yield Case(
                f"stored {name}", embedding.stored_row_kernel,
                {"token_at": "*i64", "matrix": tuple(stored.values()), "out": "*fp32",
                 "blocks": "i32"},
                of_kind | {"TILED": False, "WORDS": embedding.COLUMNS // WORD} | fixed, card.WARPS,
            )  # fmt: skip


def _rows(half: str) -> Iterator[Case]:
    from m1local.cuda import card, rows

    yield Case(
        "norm_rows", rows.norm_rows_kernel,
        {"x": half, "weight": half, "out": half, "columns": "i32", "eps": "fp32"},
        {"BLOCK": 8192}, rows.NORM_WARPS,
    )  # fmt: skip
    yield Case(
        "gate_rows", rows.gate_rows_kernel,
        {"gated": half, "up": half, "out": half, "count": "i32"}, {"BLOCK": rows.GATED}, card.WARPS,
    )  # fmt: skip
    for width in (128, 256):
        yield Case(
            f"turn_rows {width}", rows.turn_rows_kernel,
            {"packed": half, "taps": (half, half), "before": (half, half),
             "turn": ("*fp32", "*fp32"), "q": half, "k": half, "v": half, "length": "i32",
             "heads": "i32", "kv_heads": "i32", "width": "i32"},
            {"TOKENS": rows.TOKENS, "WIDTH": width}, card.WARPS,
        )  # fmt: skip


def _row(half: str) -> dict[str, str]:
    """One row of activations that is written (activation.py)."""
    return {"natural": half, "halves": "*i8", "scales": "*fp32"}


def _attention(chosen: Any, half: str, overlap: bool, small: bool) -> Iterator[Case]:
    from m1local.cuda import attention, card, prefill
    from m1local.kv_store import BYTES, FLOAT

    for (group, width), kept in itertools.product(((10, 256), (5, 128)), (FLOAT, BYTES)):
        tiles = chosen.over(in_bytes=kept == BYTES)
        stored = dict.fromkeys(("k", "v"), half if kept == FLOAT else "*i8")
        stored |= {f"{name}_scales": half if kept == FLOAT else "*bf16" for name in ("k", "v")}
        yield Case(
            f"attend {width} {kept}", attention.attend_kernel,
            {"packed": "*fp32", "packed_parts": "i32"}
            | {name: (stored[name], stored[f"{name}_scales"]) for name in "kv"}
            | {"raw": (half, half), "taps": (half, half), "turn": ("*fp32", "*fp32"),
               "position_at": "*i64", "partial": "*fp32", "greatest": "*fp32", "sums": "*fp32",
               **THEN, "heads": "i32", "width": "i32",
               "slots": "i32", "window": "i32", "scale": "fp32"},
            {"GROUP": group, "GROUP_ROWS": 16, "WIDTH": width, "KEYS": tiles.keys,
             "BYTES": kept == BYTES, "WARPS": tiles.key_warps, "SMALL": small,
             "OVERLAP": overlap},
            tiles.key_warps,
        )  # fmt: skip
        yield Case(
            f"chunk {width} {kept}", prefill.chunk_kernel,
            {"q": half} | stored | {"out": half, "start": "i32", "length": "i32",
             "heads": "i32", "width": "i32", "slots": "i32", "window": "i32", "scale": "fp32"},
            {"GROUP": group, "QUERIES": tiles.queries_of(width), "WIDTH": width,
             "KEYS": tiles.keys, "BYTES": kept == BYTES},
            tiles.query_warps,
        )  # fmt: skip
        if kept == BYTES:
            continue
        yield Case(
            f"join {width}", attention.join_kernel,
            {"partial": "*fp32", "greatest": "*fp32", "sums": "*fp32"} | _row(half)
            | {"heads": "i32", "width": "i32", "parts": "i32"},
            {"PARTS": card.MOST_KEY_PARTS, "WIDTH": width, "WHOLE": True, "OVERLAP": overlap},
            attention.JOIN_WARPS,
        )  # fmt: skip


def _places(kind: object, *at: int) -> list[tuple[int, ...]]:
    """Where an argument lies, or each part of one that is a tuple."""
    if not isinstance(kind, tuple):
        return [at]
    return [place for part, inner in enumerate(kind) for place in _places(inner, *at, part)]


def compiled(case: Case, capability: int) -> dict[str, object]:
    """What the compiler made of it: registers, bytes spilled or kept, vector loads."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    signature = {name: case.types.get(name, "constexpr") for name in names}
    assert set(case.types) | set(case.fixed) == set(names), (case.name, names)
    aligned = {
        place: [["tt.divisibility", 16]]
        for name, kind in case.types.items()
        if kind != "fp32" and name not in UNEVEN
        for place in _places(kind, names.index(name))
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.fixed, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": case.warps})
    ptx, cubin = made.asm["ptx"], made.asm["cubin"]
    # Reading the machine code takes as long as making it: only where its order is asked for.
    ordered = "griddepcontrol" in ptx or case.name.startswith(ONE_ROW)
    sass = _dumped(cubin, "-sass") if ordered else ""
    return {
        "kernel": case.name,
        "capability": capability,
        "shared": made.metadata.shared,
        "early_loads": _before_it_waits(sass),
        "asked_ahead": len(re.findall(r"@here prefetch\.global\.L2", ptx)),
        "vector_loads": len(re.findall(r"ld\.global\S*\.v[24]\.b(?:32|64)", ptx)),
        **_longest_loop(sass),
        "spread": _spread(made.asm["ttgir"]),
        **_resources(cubin),
    }


def _spread(ttgir: str) -> list[str]:
    """How the numbers that tensor cores are given lie in threads: the layouts, by their text."""
    names = {
        name
        for line in ttgir.splitlines() if "elementwise_inline_asm" in line and "mma.sync" in line
        for name in re.findall(r"x(?:i32|i64), (#\w+)>", line)
    }  # fmt: skip
    return sorted(re.findall(rf"^{name} = (.*)$", ttgir, re.MULTILINE)[0] for name in names)


def _resources(cubin: bytes) -> dict[str, int]:
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _dumped(cubin, "-res-usage")))
    return {name.lower(): int(number) for name, number in found.items()}


def _longest_loop(sass: str) -> dict[str, int]:
    """How many instructions lie in the longest loop, and how many of them wait for other warps.

    And how many before its end ask for what is read next.
    """
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    loops = [
        (int(to[1], 16), int(at, 16))
        for at, said in found
        if (to := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", said)) and int(to[1], 16) < int(at, 16)
    ]
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    inside = [said for at, said in found if begin <= int(at, 16) <= end]
    waits = sum(bool(re.search(r"\bBAR\b", said)) for said in inside)
    asked = sum("CCTL.E.PF2" in said and int(at, 16) <= end for at, said in found)
    return {"loop": len(inside), "loop_barriers": waits, "asked_early": asked}


def _before_it_waits(sass: str) -> int | None:
    """Loads before it waits for the kernel before it; None where it never waits."""
    before, waits, _ = sass.partition("ACQBULK")
    return len(re.findall(r"\bLDG\b", before)) if waits else None


def _dumped(cubin: bytes, what: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, what, path], check=True, capture_output=True, text=True)
    return done.stdout


def main() -> None:
    """Compile for the capabilities given as arguments, or for all."""
    for capability in map(int, sys.argv[1:] or CAPABILITIES):
        for case in cases(capability):
            sys.stdout.write(json.dumps(compiled(case, capability)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
