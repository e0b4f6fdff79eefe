"""Loading a checkpoint folder into a model.

What it is: two ways in, a quantized checkpoint (with m1local.json) and an original one in 16 or 32
bits. Both are strict: every tensor the model needs must be there with its shape, and none besides.
Weights stay mapped where their format can use them as stored, so the model is never in memory
twice. What it is not: a downloader or a converter.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from m1local.config import M1Config
from m1local.cuda.card import card
from m1local.errors import CheckpointError
from m1local.folder import read_json_object
from m1local.formats import LinearSpec, format_class
from m1local.formats.base import ROWS_PER_SLICE, QuantizedEmbedding, Stored
from m1local.manifest import NAME as MANIFEST
from m1local.manifest import CheckpointManifest
from m1local.model import M1Model, normalize_head
from m1local.shards import DescribedTensors, TensorFiles, Tensors

CONFIG = "config.json"
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FLOAT = LinearSpec("float")
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Mover = Callable[[Tensor], Tensor]  # to the card, see m1local/cuda/transfer.py
IGNORED_SUFFIX = "rotary_emb.inv_freq"  # some checkpoints store it; it follows from rope_theta


def parameter_shapes(config: M1Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an unquantized checkpoint."""
    with torch.device("meta"):
        model = M1Model(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def matrix_names(config: M1Config) -> list[str]:
    """The modules whose weight is a matrix: what can be quantized, embedding and head included."""
    return [
        name.removesuffix(".weight")
        for name, shape in parameter_shapes(config).items()
        if len(shape) == 2
    ]


def is_quantized(folder: Path) -> bool:
    """Whether `folder` holds a finished checkpoint of this project; raises for an unfinished one.

    A config.json that names a quantization without a manifest beside it is never taken for whole.
    """
    if (folder / MANIFEST).is_file():
        return True
    if "quantization_config" in read_json_object(folder / CONFIG):
        raise CheckpointError(
            f"{folder} is quantized but has no {MANIFEST}: it is unfinished, or made by another "
            "tool. Start from the original 16-bit checkpoint with `m1 quantize SRC OUT`."
        )
    return False


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type activations have on `device`: bfloat16 where it is native.

    Else float16 on a card, and float32 on the CPU.
    """
    if device.type == "cuda":
        return card(device).dtype
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32  # bfloat16 products are ten times slower than float32 with AVX2


class Part(NamedTuple):
    """The tensors whose names begin with `prefix`: their device, and the type of activations."""

    prefix: str
    device: torch.device
    dtype: torch.dtype


def load_model(
    folder: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    parts: Sequence[Part] = (),
    move: Mover | None = None,
) -> M1Model:
    """Load the checkpoint in `folder`, quantized or original, ready for inference.

    `dtype` is the type of activations and of unquantized matrices; by default what suits the
    device. `parts` lets a model lie on two, and `move` takes tensors to the card. Raises
    CheckpointError naming the file or tensor that is wrong.
    """
    device = device or torch.device("cpu")
    parts = parts or [Part("", device, dtype or compute_dtype(device))]
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give the folder of a checkpoint.")
    config = M1Config.from_file(folder / CONFIG)
    if is_quantized(folder):
        manifest = CheckpointManifest.read(folder)
        manifest.check_files(folder)
        shards = [name for name in manifest.files if name.endswith(".safetensors")]
        files, specs = TensorFiles(folder, shards), manifest.linears
    else:
        files, specs = TensorFiles.from_folder(folder), {}
        check_memory(config, files, parts, folder)
    with torch.device("meta"):
        model = M1Model(config)
    expected = expected_tensors(config, specs)
    check_tensors(files, expected, tied=config.tie_word_embeddings and not specs)
    for part in parts:
        load_modules(
            model, part.prefix, files, specs, dtype=part.dtype, device=part.device, move=move
        )
    return model.eval()


def load_modules(
    model: M1Model,
    prefix: str,
    files: Tensors,
    specs: Mapping[str, LinearSpec],
    *,
    dtype: torch.dtype,
    device: torch.device,
    move: Mover | None = None,
) -> None:
    """Load what of `model` (on the meta device) has a name that begins with `prefix`."""
    for name in matrix_names(model.config):
        if name.startswith(prefix):
            spec = specs.get(name, FLOAT)
            install(model, name, spec, files, dtype=dtype, device=device, move=move)
    for name, parameter in model.named_parameters():
        if parameter.is_meta and name.startswith(prefix):
            tensor = files.tensor(name).to(device=device, dtype=dtype)
            set_parameter(model, name, tensor)


def expected_tensors(
    config: M1Config, specs: Mapping[str, LinearSpec]
) -> dict[str, Stored | tuple[int, ...]]:
    """What the files must hold: full descriptions of quantized tensors, shapes of float ones."""
    if unknown := specs.keys() - set(matrix_names(config)):
        raise CheckpointError(
            f"{MANIFEST} lists {min(unknown)}, which is no matrix of this model; quantize again."
        )
    expected: dict[str, Stored | tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items():
        module = name.removesuffix(".weight")
        spec = specs.get(module, FLOAT)
        if spec.format == FLOAT.format:
            expected[name] = shape
            continue
        chosen = format_class(spec.format)
        if reason := chosen.check(shape[0], shape[1], spec):
            raise CheckpointError(
                f"{MANIFEST} says that {module} is stored as {spec.format}, but {reason}; "
                "quantize again."
            )
        stored = chosen.stored(shape[0], shape[1], spec)
        expected |= {f"{module}.{suffix}": found for suffix, found in stored.items()}
    return expected


def check_tensors(
    files: DescribedTensors, expected: Mapping[str, Stored | tuple[int, ...]], *, tied: bool
) -> None:
    """Raise CheckpointError unless `files` hold exactly the `expected` tensors."""
    names = {name for name in files.names if not name.endswith(IGNORED_SUFFIX)}
    wanted = set(expected)
    if tied and f"{HEAD}.weight" not in names:
        wanted.discard(f"{HEAD}.weight")
    for problem, which in (("lacks", wanted - names), ("has the foreign", names - wanted)):
        if which:
            more = f" and {len(which) - 1} more" if len(which) > 1 else ""
            raise CheckpointError(
                f"{files.folder} {problem} tensor {min(which)}{more}; the files do not belong to "
                f"its {CONFIG}. Fetch the model again."
            )
    for name in sorted(wanted):
        where = f"{files.folder / files.file_of(name)}: {name}"
        shape, dtype, found = files.shape(name), files.dtype(name), expected[name]
        wanted_shape = found.shape if isinstance(found, Stored) else found
        if shape != wanted_shape:
            raise CheckpointError(
                f"{where} has shape {list(shape)}, {CONFIG} implies {list(wanted_shape)}; the "
                "files do not belong together."
            )
        allowed = (found.dtype,) if isinstance(found, Stored) else FLOAT_DTYPES
        if dtype not in allowed:
            raise CheckpointError(
                f"{where} is stored as {dtype}, expected {' or '.join(map(str, allowed))}."
            )


def install(
    model: M1Model,
    name: str,
    spec: LinearSpec,
    files: Tensors,
    *,
    dtype: torch.dtype,
    device: torch.device,
    move: Mover | None = None,
) -> None:
    """Put the matrix `name` into `model`, in the format its `spec` says."""
    if spec.format == FLOAT.format:
        stored_name = f"{name}.weight"
        if name == HEAD and stored_name not in files.names:  # tied: the embedding serves as head
            stored_name = f"{EMBEDDING}.weight"
        tensor = files.tensor(stored_name)
        if name == HEAD:
            tensor = normalize_head_sliced(tensor, dtype)
        tensor = tensor.to(dtype)
        moved = move(tensor) if move and device.type != "cpu" else tensor.to(device)
        set_parameter(model, f"{name}.weight", moved)
        return
    shape = tuple(model.get_submodule(name).get_parameter("weight").shape)
    chosen = format_class(spec.format)
    tensors = {
        suffix: files.tensor(f"{name}.{suffix}")
        for suffix in chosen.stored(shape[0], shape[1], spec)
    }
    if device.type != "cpu":
        take = move or (lambda tensor: tensor.to(device))
        tensors = {suffix: take(tensor) for suffix, tensor in tensors.items()}
    size = (shape[0], shape[1])
    if name == EMBEDDING:
        module: nn.Module = QuantizedEmbedding(chosen.table(tensors, size, spec), dtype)
    else:
        module = chosen.from_tensors(tensors, size, spec)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def normalize_head_sliced(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """NormHead slice by slice: the 14B's head takes 2.7 GB in float32, once."""
    head = torch.empty(weight.shape, dtype=dtype)
    for start in range(0, weight.shape[0], ROWS_PER_SLICE):
        part = slice(start, start + ROWS_PER_SLICE)
        head[part] = normalize_head(weight[part].to(dtype))
    return head


def check_memory(
    config: M1Config, files: DescribedTensors, parts: Sequence[Part], folder: Path
) -> None:
    """Raise CheckpointError when what the CPU computes of an original cannot fit in memory.

    Only what is stored in another type counts; else weights stay mapped and nothing is copied.
    """
    if not hasattr(os, "sysconf"):
        return
    needed, dtype = 0, torch.float32
    for part in (part for part in parts if part.device.type == "cpu"):
        for name, shape in parameter_shapes(config).items():
            ours = name.startswith(part.prefix) and name in files.names
            if ours and files.dtype(name) is not part.dtype:
                needed += torch.Size(shape).numel() * part.dtype.itemsize
                dtype = part.dtype
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.9 * memory:
        raise CheckpointError(
            f"{folder} takes {needed / 2**30:.0f} GiB as {dtype}, the type this processor computes "
            f"in, but the machine has {memory / 2**30:.0f} GiB. Quantize it: `m1 run {folder}`."
        )


def set_parameter(model: M1Model, name: str, tensor: Tensor) -> None:
    """Replace the parameter `name` by `tensor`, which may be mapped from a file."""
    module, _, attribute = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    setattr(model.get_submodule(module), attribute, parameter)
