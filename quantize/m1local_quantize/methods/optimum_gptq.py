"""optimum-gptq: GPTQ as Hugging Face's optimum runs it (with GPTQModel), stored as our int4.

What it is: the one file that imports optimum, and a second opinion on gptq.py. optimum passes the
calibration text through the layers and quantizes matrix by matrix, each on what those before it
let through; its codes, scales and integer zeros then become w = (q - 8) * scale + zero. What it is
not: for machines without memory for the whole original in 32 bits (55 GB for the 14B), which
optimum holds until it has ended. Nor is anything of it kept: a continued run begins with the first
layer again, and ends in the same bytes.
Source: optimum 2.3, gptq/quantizer.py; gptqmodel 7.6, quantization/gptq.py.
"""

import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from m1local.checkpoint import EMBEDDING, HEAD, load_modules
from m1local.errors import DependencyError, RecipeError
from m1local.formats import LinearSpec
from m1local.formats.groups import Int4Linear, group_size_of
from m1local.model import M1Backbone, M1Model
from m1local_quantize.evaluate import Sample
from m1local_quantize.plan import Plan
from m1local_quantize.source import Source

NAME = "optimum-gptq"
INSTALL = (
    f'pip install torch=={torch.__version__.partition("+")[0]} "optimum>=2.3,<3" "gptqmodel>=7,<8"'
)


def optimum_gptq() -> ModuleType:
    """Import optimum.gptq and what it works with, which introduces itself with a banner."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # about torchao's enums
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            import_module("gptqmodel")
            return import_module("optimum.gptq")
    except ImportError as error:
        raise DependencyError(
            f"The method {NAME} needs optimum and gptqmodel ({error}): `{INSTALL}`."
        ) from error


def versions(plan: Plan) -> list[str]:
    """Of the packages that decide what is stored; none where `plan` does not use them."""
    packages = ("optimum", "gptqmodel") if matrices(plan) else ()
    return [f"{package} {metadata.version(package)}" for package in packages]


def matrices(plan: Plan) -> dict[str, LinearSpec]:
    """The matrices that optimum is to quantize; embedding and head are none of its layers."""
    return {
        module: step.spec
        for step in plan.steps
        if step.method == NAME
        and (module := step.name.removesuffix(".weight")) not in (EMBEDDING, HEAD)
    }


def check(source: Source, plan: Plan) -> None:
    """Raise DependencyError or RecipeError where `plan` asks for what cannot be done."""
    sizes = {group_size_of(spec) for spec in matrices(plan).values()}
    if sizes and source.files.passing:
        raise RecipeError(
            f"The method {NAME} needs the whole model at once, which a source that is quantized "
            "while it is fetched never is; keep the source, or choose another method."
        )
    if len(sizes) > 1:
        raise RecipeError(
            f"The method {NAME} knows one group size for the whole model, but the recipe has "
            f"{' and '.join(map(str, sorted(sizes)))}."
        )
    if sizes:
        optimum_gptq()


class Untouched(nn.Linear):
    """A matrix that is not optimum's: it takes those that are exactly nn.Linear."""


class Reader(nn.Module):
    """M1's layers as optimum calls them: the model by ids and mask, a layer by hidden states only.

    It has no `config`, which optimum would write to.
    """

    def __init__(self, model: M1Backbone) -> None:
        """Let the layers of `model` make up what they are not given."""
        super().__init__()
        self.model = model
        for layer in model.layers:
            layer.register_forward_pre_hook(self._complete)

    def _complete(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        return x, self.model.chunk(0, x.shape[1], x.device), None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(1, T) ids -> (1, T, C); one text at a time has no padding, and its mask says nothing."""
        states: Tensor = self.model(input_ids)
        return states


class Quantized:
    """What optimum makes of the matrices of one plan: all at once, when the first is asked for."""

    def __init__(self, source: Source, plan: Plan, samples: Sequence[Sample]) -> None:
        """Do nothing yet."""
        self._source, self._samples = source, samples
        self._matrices = matrices(plan)
        self._stored: dict[str, dict[str, Tensor]] | None = None

    def __contains__(self, module: str) -> bool:
        """Whether the matrix `module` comes from here."""
        return module in self._matrices

    def tensors(self, module: str) -> Mapping[str, Tensor]:
        """What is stored of the matrix `module`; to be asked for once."""
        if self._stored is None:
            backbone = self._load()
            found = quantize(backbone, next(iter(self._matrices.values())), self._samples)
            self._stored = {}
            for name, (scale, zero) in found.items():
                linear = backbone.get_submodule(name.removeprefix("model."))
                self._stored[name] = stored(linear.get_parameter("weight"), scale, zero)
                linear.weight = None  # type: ignore[assignment]
        return self._stored.pop(module)

    def _load(self) -> M1Backbone:
        """The source's layers in 32 bits, checked to be numbers."""
        for module in self._matrices:
            name = f"{module}.weight"
            whole = self._source.tensor(name)
            self._source.rows(name, whole, 0, whole.shape[0])
        with torch.device("meta"):
            model = M1Model(self._source.config)
        files, cpu = self._source.files, torch.device("cpu")
        load_modules(model, "model.", files, {}, dtype=torch.float32, device=cpu)
        for name, module in model.named_modules():
            if type(module) is nn.Linear and name not in self._matrices:
                module.__class__ = Untouched
        return model.model


def quantize(
    backbone: M1Backbone, spec: LinearSpec, samples: Sequence[Sample]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Quantize the nn.Linear of `backbone` in place; scales and zeros (N, groups) by name.

    The groups lie in a row one after the other: desc_act, which would mix them, is off.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def take(
        model: nn.Module, quantizers: Mapping[str, tuple[Any, Tensor, Tensor, Tensor]]
    ) -> None:
        """Instead of packing into GPTQModel's own layers."""
        for name, (_, scale, zero, group) in quantizers.items():
            in_order = torch.arange(group.numel()) // group_size_of(spec)
            assert torch.equal(group.cpu().long(), in_order), (name, group)
            found[name] = scale.cpu(), zero.cpu()

    quantizer = optimum_gptq().GPTQQuantizer(
        bits=4,
        group_size=group_size_of(spec),
        sym=False,
        desc_act=False,
        dataset=[_as_optimum_reads(sample) for sample in samples],
        model_seqlen=max(len(sample.token_ids) for sample in samples),
        block_name_to_quantize="model.layers",
        module_name_preceding_first_block=["model.embed_tokens"],
    )
    quantizer.pack_model = take
    quantizer.post_init_model = lambda model: model
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        quantizer.quantize_model(Reader(backbone))
    return found


def _as_optimum_reads(sample: Sample) -> dict[str, Tensor]:
    ids = torch.tensor([sample.token_ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stored(weight: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    """int4's tensors of W (N, K) = (q - zero) * scale, with q from 0 to 15.

    The codes are optimum's, exactly; scales and zeros are rounded to bfloat16.
    """
    grouped = weight.float().cpu().reshape(*scale.shape, -1)
    codes = (grouped / scale[..., None] + zero[..., None]).round_().to(torch.uint8).flatten(1)
    return {
        **Int4Linear.pack(codes),
        "scales": scale.to(torch.bfloat16),
        "zeros": ((Int4Linear.middle - zero) * scale).to(torch.bfloat16),
    }
