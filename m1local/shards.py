"""Tensors in a folder of safetensors files: found by name, mapped, never trusted.

What it is: the reading side of a checkpoint folder. Files are mapped, so a tensor costs memory
only while it is used. What it is not: a loader of other file types; pickled weights could run code
and are refused. Names that an index or a manifest gives must lie inside the folder.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from m1local.errors import CheckpointError
from m1local.folder import inside

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class Tensors(Protocol):
    """Where a model's tensors can be had by name."""

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`."""


class DescribedTensors(Tensors, Protocol):
    """Tensors of a checkpoint's files, whose shapes and types are known without reading them."""

    folder: Path

    def file_of(self, name: str) -> str:
        """The file that holds the tensor `name`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor; raises CheckpointError for one unknown here."""


class TensorFiles:
    """All tensors of a folder by name, each read from its file when asked for."""

    def __init__(self, folder: Path, file_names: list[str]) -> None:
        """Open `file_names` in `folder`; raises CheckpointError for the first that is damaged."""
        self.folder = folder
        self.files = {name: _open(inside(folder, name)) for name in file_names}
        self._file_of: dict[str, str] = {}
        for file_name, handle in self.files.items():
            for tensor_name in handle.keys():  # noqa: SIM118  # a handle is no mapping
                if tensor_name in self._file_of:
                    raise CheckpointError(
                        f"{folder}: {tensor_name} is in {self._file_of[tensor_name]} and in "
                        f"{file_name}; remove the file that does not belong here."
                    )
                self._file_of[tensor_name] = file_name

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Open the files the index names, or all *.safetensors where there is no index."""
        index = folder / INDEX
        if not index.exists():
            names = sorted(path.name for path in folder.glob("*.safetensors"))
            if not names:
                raise CheckpointError(_nothing_found(folder))
            return cls(folder, names)
        weight_map = _read_weight_map(index)
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not inside(folder, name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {', '.join(missing)}, which {INDEX} names; fetch what is missing."
            )
        found = cls(folder, names)
        for tensor_name, file_name in weight_map.items():
            if found._file_of.get(tensor_name) != file_name:
                raise CheckpointError(
                    f"{index} is stale: {tensor_name} is not in {file_name}. Fetch the index that "
                    "belongs to these files, or delete it to read them all."
                )
        return found

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._file_of)

    def file_of(self, name: str) -> str:
        """The file that holds the tensor `name`."""
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header alone; raises CheckpointError for one unknown here."""
        return known_dtype(self._slice(name).get_dtype(), self.folder / self._file_of[name], name)

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped from its file."""
        found: Tensor = self.files[self._file_of[name]].get_tensor(name)
        return found

    def _slice(self, name: str) -> Any:
        return self.files[self._file_of[name]].get_slice(name)


def known_dtype(code: str, file: Path, name: str) -> torch.dtype:
    """The type a header calls `code`; raises CheckpointError for one unknown here."""
    if code not in DTYPES:
        raise CheckpointError(
            f"{file}: {name} is stored as {code}; this m1local reads {', '.join(DTYPES)}."
        )
    return DTYPES[code]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; fetch it again.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); fetch that file again."
        ) from error


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is no valid index ({error!r}); fetch it again, or delete it to read all "
            "*.safetensors files of the folder."
        ) from error
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(f"{index}: weight_map is malformed; fetch the file again.")
    return weight_map


def _nothing_found(folder: Path) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened "
            "and are never read; fetch the *.safetensors files of this model instead."
        )
    return f"{folder} holds no *.safetensors file; fetch the weights of the model."
