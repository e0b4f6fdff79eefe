"""mlx-lm's own 4-bit quantization of a checkpoint, for bench.quality to compare with.

What it is: mlx-lm loads the original, `quantize_model` does what `mlx_lm.convert -q` does, and what
it made of every matrix is put, dequantized, into this project's model, so that both are measured by
the same forward pass in 32 bits. What it is not: a measure of mlx-lm's speed; it needs the extra
`oracle`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from m1local.checkpoint import load_model, set_parameter
from m1local.model import M1Model


@dataclass(frozen=True, slots=True)
class QuantizedByMlx:
    """A model with mlx-lm's weights, and the bytes that mlx-lm stores of it."""

    model: M1Model
    nbytes: int
    version: str


def quantize_by_mlx(folder: Path, *, bits: int, group_size: int) -> QuantizedByMlx:
    """Quantize the original in `folder` as mlx-lm does; embedding and head too, as it does."""
    try:
        import mlx.core as mx
        import mlx_lm
        from mlx.utils import tree_flatten
        from mlx_lm.models import baichuan_m1
        from mlx_lm.utils import quantize_model
    except ImportError:
        raise SystemExit("mlx-lm is missing: pip install 'm1local[oracle]'") from None
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    theirs = baichuan_m1.Model(baichuan_m1.ModelArgs.from_dict(raw))
    weights: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded: Any = mx.load(str(path))  # a dict for this file type
        weights.update(loaded)
    theirs.load_weights(list(theirs.sanitize(weights).items()), strict=True)
    theirs, _ = quantize_model(theirs, raw, group_size, bits)
    nbytes = sum(array.nbytes for _, array in tree_flatten(theirs.parameters()))
    ours = load_model(folder, dtype=torch.float32)
    for name, module in theirs.named_modules():
        if hasattr(module, "scales"):
            whole = mx.dequantize(module.weight, module.scales, module.biases, group_size, bits)
            set_parameter(ours, f"{name}.weight", _to_torch(whole.astype(mx.float32)))
    return QuantizedByMlx(ours, nbytes, mlx_lm.__version__)


def _to_torch(array: Any) -> Tensor:
    return torch.from_numpy(numpy.array(array))
