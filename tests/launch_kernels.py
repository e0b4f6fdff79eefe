"""Every launch as it is made on a card, but for the launch itself: without one.

Run as a program (`python -m tests.launch_kernels 90 int4`): a format's products of one, a few and
many rows, a decode step and a prompt's attention go through Triton's own launcher, with the tensors
that the runtime would pass, as far as what Triton itself makes of them for the card. So types that
do not fit show here; in compile_kernels.py, which goes on to machine code, they are written down by
hand. It prints the kernels' names. A process of its own, since kernels that were imported for the
interpreter cannot be compiled.
"""

import os
import sys
from dataclasses import replace
from typing import Any

import torch

FORMATS = ("int3", "int4", "int5", "int6", "int8", "bnb-nf4", "bnb-nf4-dq", "bnb-fp4")
STEPS = ("int4", "int8", "nf4")  # the formats of bench/gpu_model.py
MULTIPROCESSORS = 132


class Driver:
    """As much of a card's driver as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(capability: int, launched: list[str]) -> None:
    """Make a card of `capability`, for which everything is compiled and nothing launched."""
    import triton
    from triton.runtime.jit import JITFunction

    from m1local.cuda import card, support

    chosen = card.Card(divmod(capability, 10), MULTIPROCESSORS)
    vars(card)["card"] = lambda device: chosen  # before the others import it
    vars(support)["missing"] = lambda device: None
    from m1local.cuda import overlap

    vars(overlap)["accepted"] = lambda device: True
    triton.knobs.runtime.add_stages_inspection_hook = without_machine_code
    triton.runtime.driver.set_active(Driver(capability))
    run = JITFunction.run

    def compiled(self: Any, *args: Any, **options: Any) -> Any:
        launched.append(self.__name__)
        return run(self, *args, **options | {"warmup": True})

    JITFunction.run = compiled


def without_machine_code(*given: Any) -> Any:
    """Triton's hook for other steps of compiling: leave out those that are none of Triton's own."""
    if not given:
        return "types", "types"  # what the cache goes by
    stages = given[1]
    for name in ("llir", "ptx"):
        del stages[name]

    def nothing(source: object, metadata: dict[str, Any]) -> bytes:
        metadata |= {"name": "", "shared": 0}
        return b""

    stages["cubin"] = nothing
    return None


def products(name: str, dtype: torch.dtype) -> None:
    """One, two and many rows by a matrix in the format `name`."""
    from m1local.cuda import products
    from m1local.formats import LinearSpec, format_class
    from m1local.formats.base import QuantizedEmbedding
    from m1local.formats.groups import GroupLinear

    spec, shape = (
        LinearSpec(name, 64 if name.startswith("int") and name != "int8" else None),
        (96, 512),
    )
    chosen = format_class(spec.format)
    tensors = chosen.shared_tensors(shape, spec) | chosen.quantize(torch.randn(shape), spec)
    table = chosen.table(tensors, shape, spec)
    matrix = table.cuda_matrix()
    assert matrix is not None
    if chosen.gathers:
        row_of(QuantizedEmbedding(table, dtype))
    if isinstance(table, GroupLinear):
        table.tile()  # as on a card
        matrix = table.cuda_matrix()
        assert matrix is not None
        assert matrix.is_tiled
    for rows in (1, 2, 100):
        products.product(torch.randn(rows, shape[1]).to(dtype), matrix)


def row_of(embedding: torch.nn.Module) -> None:
    """A row of an embedding, and several."""
    from m1local.cuda.embedding import EmbeddingRows

    for tokens, dtype in ((1, torch.float32), (40, torch.bfloat16), (40, torch.float16)):
        ids = torch.zeros(tokens, dtype=torch.long)
        EmbeddingRows(embedding).write(ids, torch.zeros((tokens, 512), dtype=dtype))


def step(name: str, dtype: torch.dtype) -> None:
    """A decode step of two layers of the 14B; a prompt's attention, and what is beside products."""
    from bench.gpu_model import M1_14B, filled_cache, random_model
    from m1local import placement
    from m1local.cuda import rows
    from m1local.cuda.decode import DecodeStep
    from m1local.cuda.prefill import attend_chunk
    from m1local.memory import Setting
    from m1local.native.neighbours import HeadTurn
    from m1local.rope import rotation

    config = replace(
        M1_14B, num_hidden_layers=2, vocab_size=4096, sliding_window_layers=frozenset({1})
    )
    vars(placement)["compute_dtype"] = lambda device: dtype
    placed = placement.Placement(torch.device("cpu"), 0, Setting(2048))
    cache = filled_cache(config, placed, 600)
    DecodeStep(random_model(config, name, placed), cache)()
    for layer in cache.layers:
        heads, width = layer.layout.num_heads, layer.layout.head_dim
        attend_chunk(torch.zeros((1, heads, 40, width), dtype=dtype), layer, 600)
        kv_heads = layer.layout.num_kv_heads
        packed = torch.zeros((1, 40, (heads + 2 * kv_heads) * width), dtype=dtype)
        taps, before = torch.zeros((2, kv_heads, 2), dtype=dtype), layer.raw_before(600)
        turn = rotation(torch.arange(600, 640), width, config.rope_theta)
        rows.turn_heads(packed, HeadTurn((taps[0], taps[1]), before, turn, kv_heads))
    rows.norm(packed, torch.zeros(packed.shape[-1], dtype=dtype), 1e-6)
    rows.gate(packed, packed)


@torch.inference_mode()
def main() -> None:
    """Compile what the capability and the formats given as arguments launch."""
    launched: list[str] = []
    capability = int(sys.argv[1])
    pretend(capability, launched)
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    row_of(torch.nn.Embedding(96, 512, dtype=dtype))
    for name in sys.argv[2:] or FORMATS:
        products(name, dtype)
        if (known := name.removeprefix("bnb-")) in STEPS:
            step(known, dtype)
    sys.stdout.write("\n".join(sorted(set(launched))) + "\n")


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
