"""llama.cpp's formats of a checkpoint, for bench.quality to compare with.

What it is: every matrix rounded by the package `gguf`, llama.cpp's own, and put, dequantized, into
this project's model, so that both are measured by the same forward pass in 32 bits: `--pure` ones,
and the mixture that `llama-quantize` makes of Q4_0 by default, whose head has more bits. What it is
not: a GGUF file of Baichuan-M1, which llama.cpp could not run, or its speed
(bench/decode_speed.py).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from m1local.checkpoint import load_model, set_parameter
from m1local.model import M1Model

# The formats of the matrices, and of the head.
KINDS = {"Q4_0 --pure": ("Q4_0", "Q4_0"), "Q4_0": ("Q4_0", "Q6_K"), "Q8_0": ("Q8_0", "Q8_0")}
OF_SIX_BITS = 256  # columns that Q6_K takes at once; what they do not divide llama.cpp makes Q8_0


@dataclass(frozen=True, slots=True)
class QuantizedByGguf:
    """A model with llama.cpp's weights, and the bytes that a GGUF file has of them."""

    model: M1Model
    nbytes: int


def quantize_by_gguf(folder: Path, kind: str) -> QuantizedByGguf:
    """Quantize the original in `folder` to one of KINDS.

    Raises SystemExit where the package is missing, or it would have to make Q6_K, which it cannot.
    """
    try:
        import gguf
    except ImportError:
        raise SystemExit("The peer's formats need the package gguf: pip install gguf") from None
    of_matrices, of_head = KINDS[kind]
    model, nbytes = load_model(folder, dtype=torch.float32), 0
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() != 2:
            nbytes += parameter.numel() * 4  # a GGUF file has them in 32 bits
            continue
        chosen = of_head if name.startswith("lm_head") else of_matrices
        if chosen == "Q6_K":
            if parameter.shape[1] % OF_SIX_BITS == 0:
                raise SystemExit("The head would be Q6_K, which the package gguf cannot make.")
            chosen = "Q8_0"
        as_what = gguf.GGMLQuantizationType[chosen]
        stored = gguf.quants.quantize(parameter.detach().numpy(), as_what)
        nbytes += stored.nbytes
        whole = gguf.quants.dequantize(stored, as_what)
        set_parameter(model, name, torch.from_numpy(whole))
    return QuantizedByGguf(model, nbytes)
