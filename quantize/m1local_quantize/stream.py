"""A checkpoint's hidden states over a text, advanced stage by stage.

What it is: the forward pass with one layer in memory at a time, in 32 bits. The stages are the
embedding, each layer, and the end: norm and head; they are the order in which a checkpoint is
written, too. What it is not: a way to answer; nothing is cached and nothing is drawn.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from m1local.checkpoint import EMBEDDING, FLOAT, HEAD, load_modules
from m1local.config import M1Config
from m1local.formats import LinearSpec
from m1local.formats.base import QuantizedLinear
from m1local.model import M1Model, normalize_head
from m1local.shards import Tensors
from m1local_quantize.evaluate import Sample
from m1local_quantize.source import Source

LAYER = "model.layers."
ROWS_OF_HEAD = 4096  # at a time, in 32 bits


def stage_of(name: str, layers: int) -> int:
    """The stage in which the tensor `name` is used: 0, 1 + its layer's number, or 1 + `layers`."""
    if name.startswith(LAYER):
        return 1 + int(name.removeprefix(LAYER).partition(".")[0])
    return 0 if name.startswith(EMBEDDING) else 1 + layers


class Stream:
    """One checkpoint's hidden states over some samples."""

    def __init__(
        self,
        config: M1Config,
        files: Tensors,
        specs: Mapping[str, LinearSpec],
        samples: Sequence[Sample],
    ) -> None:
        """Begin before the embedding."""
        with torch.device("meta"):
            self._model = M1Model(config)
        self._files, self._specs, self._samples = files, specs, samples
        self._layers = config.num_hidden_layers
        self.passed = 0  # stages
        self.hidden: list[Tensor] = []

    @classmethod
    def of_source(cls, source: Source, samples: Sequence[Sample]) -> Self:
        """The original's."""
        return cls(source.config, source.files, {}, samples)

    @torch.inference_mode()
    def advance(self) -> None:
        """Pass the next stage and forget its weights; a head in 16 bits stays in its file."""
        if self.passed == 0:
            self._embed()
        elif self.passed <= self._layers:
            self._pass_layer(self.passed - 1)
        else:
            self._finish()
        self.passed += 1

    def _embed(self) -> None:
        """Look the tokens up; of a 16-bit table only these rows are read."""
        ids = [torch.tensor([sample.token_ids]) for sample in self._samples]
        backbone = self._model.model
        if self._specs.get(EMBEDDING, FLOAT) != FLOAT:
            self._load(EMBEDDING)
            self.hidden = [backbone.embed_tokens(row) for row in ids]
            backbone.embed_tokens = torch.nn.Identity()  # type: ignore[assignment]
        else:
            rows = self._files.tensor(f"{EMBEDDING}.weight")
            self.hidden = [rows[row].float() for row in ids]

    def _pass_layer(self, layer: int) -> None:
        backbone = self._model.model
        self._load(f"{LAYER}{layer}.")
        block = backbone.layers[layer]
        for number, x in enumerate(self.hidden):
            self.hidden[number] = block(x, backbone.chunk(0, x.shape[1], x.device), None)
        backbone.layers[layer] = torch.nn.Identity()

    def _finish(self) -> None:
        self._load("model.norm")
        self.hidden = [self._model.model.norm(x) for x in self.hidden]

    def logits(self, sample: int, rows: slice) -> Tensor:
        """Logits (n, V) at some positions of a sample, after the last stage."""
        x = self.hidden[sample][0, rows]
        if self._specs.get(HEAD, FLOAT) == FLOAT:
            return self._sliced_logits(x)
        if not isinstance(self._model.lm_head, QuantizedLinear):
            self._load(HEAD)
        logits: Tensor = self._model.lm_head(x).float()
        return logits

    def _sliced_logits(self, x: Tensor) -> Tensor:
        """As a 16-bit head's, without its 2.7 GB in 32 bits."""
        name = f"{HEAD}.weight"
        if name not in self._files.names:  # tied: the embedding serves as head
            name = f"{EMBEDDING}.weight"
        head = self._files.tensor(name)
        logits = x.new_empty((x.shape[0], head.shape[0]))
        for start in range(0, head.shape[0], ROWS_OF_HEAD):
            part = slice(start, start + ROWS_OF_HEAD)
            logits[:, part] = x @ normalize_head(head[part].float()).T
        return logits

    def _load(self, prefix: str) -> None:
        cpu = torch.device("cpu")
        load_modules(self._model, prefix, self._files, self._specs, dtype=torch.float32, device=cpu)
