"""The checkpoint to be quantized: opened, checked against its config, never written to.

What it is: strict reading of a 16- or 32-bit Baichuan-M1 folder. What it is not: a download;
its weights may still be on their way (arriving.py).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from m1local.checkpoint import (
    CONFIG,
    EMBEDDING,
    HEAD,
    check_tensors,
    expected_tensors,
    is_quantized,
)
from m1local.config import M1Config
from m1local.errors import CheckpointError
from m1local.generation_config import GenerationConfig
from m1local.model import normalize_head
from m1local.native import quantize as native
from m1local.tokenizer import M1Tokenizer
from m1local_quantize.hashing import FileHashes
from m1local_quantize.hub import Record
from m1local_quantize.source_files import LocalFiles, SourceFiles
from m1local_quantize.text import Text


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source checkpoint."""

    folder: Path
    config: M1Config
    files: SourceFiles
    tokenizer: M1Tokenizer
    generation: GenerationConfig

    @classmethod
    def open(
        cls, folder: Path, files: SourceFiles | None = None, hashes: FileHashes | None = None
    ) -> "Source":
        """Open `folder`; its weights are `files`, or lie in it, some of them hashed already.

        Raises CheckpointError naming what is missing, foreign or damaged.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder; give the folder of a checkpoint.")
        config = M1Config.from_file(folder / CONFIG)
        if is_quantized(folder):
            raise CheckpointError(
                f"{folder} is quantized already; give the original 16-bit checkpoint."
            )
        # What the result could not be used without is found out now, not after an hour.
        tokenizer = M1Tokenizer.from_folder(folder)
        generation = GenerationConfig.from_folder(folder)
        if files is None:
            files = LocalFiles.from_folder(folder)
            files.hashes = hashes or files.hashes
        check_tensors(files, expected_tensors(config, {}), tied=config.tie_word_embeddings)
        return cls(folder, config, files, tokenizer, generation)

    def read_text(self, path: Path) -> Text:
        """A text in this model's tokens, in the chat template where it is a chat model."""
        longest = self.config.max_position_embeddings
        return Text.read(path, self.tokenizer, longest=longest, chat=self.generation.is_chat)

    @property
    def name(self) -> str:
        """The repository it was fetched from, or the folder's name."""
        record = Record.read(self.folder)
        return self.folder.resolve().name if record is None else record.repository

    @property
    def revision(self) -> str | None:
        """The commit it was fetched at, where it was fetched."""
        record = Record.read(self.folder)
        return None if record is None else record.revision

    def stored_name(self, name: str) -> str:
        """Where the tensor `name` lies: a tied head is the embedding."""
        if name == f"{HEAD}.weight" and name not in self.files.names:
            return f"{EMBEDDING}.weight"
        return name

    def dtype(self, name: str) -> torch.dtype:
        """The type of the tensor `name`."""
        return self.files.dtype(self.stored_name(name))

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, mapped from its file."""
        return self.files.tensor(self.stored_name(name))

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor `name`."""
        stored = self.stored_name(name)
        return torch.Size(self.files.shape(stored)).numel() * self.files.dtype(stored).itemsize

    def rows(self, name: str, whole: Tensor, start: int, stop: int) -> Tensor:
        """Rows of a matrix in 32 bits, checked to be numbers; the head's are normalized (NormHead).

        Nothing is lost by that: the source's own types are no wider.
        """
        return self.narrow_rows(name, whole, start, stop).float()

    def narrow_rows(self, name: str, whole: Tensor, start: int, stop: int) -> Tensor:
        """As `rows`, in the type they are stored in where that saves a copy."""
        part = whole[start:stop]
        if not all_finite(part):
            finite = part.reshape(len(part), -1).isfinite().all(dim=1)
            raise CheckpointError(
                f"{self.folder / self.files.file_of(self.stored_name(name))}: {name} holds values "
                f"that are no numbers in its row {start + int(finite.int().argmin())}; fetch that "
                "file again."
            )
        return normalize_head(part, torch.float32) if name == f"{HEAD}.weight" else part


def all_finite(part: Tensor) -> bool:
    """Whether all values are finite numbers."""
    found = native.all_finite(part)
    if found is None:
        return bool(torch.isfinite(part.float().sum())) or bool(torch.isfinite(part).all())
    return found
