"""What comes into each matrix when the model reads a text: the Hessians that gptq needs.

What it is: hidden states of the calibration text, passed layer by layer: through a layer as it is
in the source, to see what its matrices are given, and then through the same layer as it was
written, so that the next one sees the errors made so far. One layer is in memory at a time. What
it is not: state to be saved; a continued run passes the finished layers again, from their files.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from m1local.checkpoint import load_modules
from m1local.errors import CalibrationError
from m1local.model import M1Model
from m1local_quantize.evaluate import Sample
from m1local_quantize.plan import Plan
from m1local_quantize.shard_writer import Layout, partial_path
from m1local_quantize.source import Source
from m1local_quantize.stream import LAYER, Stream

SAME_INPUT = {"mlp.up_proj": "mlp.gate_proj"}  # one Hessian serves both


class Written:
    """The tensors of a checkpoint that is being written, read back from its files."""

    def __init__(self, target: Path, plan: Plan) -> None:
        """Look in `target` for what `plan` says."""
        self._target = target
        self._shards = {
            file: {name: stored for step in steps for name, stored in step.tensors.items()}
            for file, steps in plan.shards.items()
        }
        self._layouts: dict[str, Layout] = {}

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors, written or not yet."""
        return {name for tensors in self._shards.values() for name in tensors}

    def tensor(self, name: str) -> Tensor:
        """A tensor that has been written."""
        file_name = next(file for file, tensors in self._shards.items() if name in tensors)
        stored = self._shards[file_name][name]
        if file_name not in self._layouts:
            self._layouts[file_name] = Layout.of(self._shards[file_name])
        path = self._target / file_name
        with (path if path.is_file() else partial_path(path)).open("rb") as file:
            file.seek(self._layouts[file_name].offsets[name])
            content = bytearray(file.read(stored.nbytes))
        if not content:
            return torch.empty(stored.shape, dtype=stored.dtype)
        return torch.frombuffer(content, dtype=stored.dtype).reshape(stored.shape)


class Calibrator:
    """Hessians of one layer's matrices at a time, in the order of the layers."""

    def __init__(self, source: Source, target: Path, plan: Plan, samples: Sequence[Sample]) -> None:
        """Begin before the first layer."""
        self._source = source
        self.inputs = sum(len(sample.token_ids) for sample in samples)
        self._written = Stream(source.config, Written(target, plan), plan.linears, samples)
        self._layer = -1
        self._hessians: dict[str, Tensor] = {}

    def hessian(self, module: str) -> Tensor:
        """X^T X (K, K) of the inputs of the matrix `module`; all layers before it are written.

        The caller may change it; it is computed once for every matrix. Raises CalibrationError
        where an input was not finite, since no factorization would end.
        """
        number, _, name = module.removeprefix(LAYER).partition(".")
        layer = int(number)
        if layer != self._layer:
            self._hessians = {}
            while self._written.passed <= layer:
                self._written.advance()
            self._hessians = self._capture(layer)
            self._layer = layer
        found = self._hessians[SAME_INPUT.get(name, name)]
        if not bool(torch.isfinite(found.diagonal()).all()):
            raise CalibrationError(
                f"With the calibration text, what comes into {module} is not finite. Give another "
                "text (--calibration), or take a recipe without one (int4)."
            )
        if name in SAME_INPUT.values():
            return found.clone()
        return self._hessians.pop(SAME_INPUT.get(name, name))

    @torch.inference_mode()
    def _capture(self, layer: int) -> dict[str, Tensor]:
        with torch.device("meta"):
            model = M1Model(self._source.config)
        prefix = f"{LAYER}{layer}."
        cpu = torch.device("cpu")
        load_modules(model, prefix, self._source.files, {}, dtype=torch.float32, device=cpu)
        block = model.model.layers[layer]
        sums: dict[str, Tensor] = {}

        def note(name: str, linear: nn.Linear) -> None:
            sums[name] = torch.zeros(linear.in_features, linear.in_features)

            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].flatten(0, -2)
                sums[name].addmm_(x.T, x)

            linear.register_forward_pre_hook(hook)

        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and name not in SAME_INPUT:
                note(name, module)
        for x in self._written.hidden:
            block(x, model.model.chunk(0, x.shape[1], x.device), None)
        return sums
