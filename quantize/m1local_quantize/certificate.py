"""The quality certificate: a checkpoint measured against its original, layer by layer.

What it is: two streams of hidden states over the same text, one through the 16-bit layers and one
through the quantized ones; each layer is loaded, passed by both and dropped, so that no model is
ever whole in memory. The figures are those of `evaluate.compare` on loaded models. What it is not:
a promise about answers; the text is short, and named beside the figures.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from m1local.checkpoint import CONFIG, EMBEDDING, FLOAT, HEAD, load_modules
from m1local.config import M1Config
from m1local.errors import CheckpointError
from m1local.formats import LinearSpec
from m1local.formats.base import QuantizedLinear
from m1local.model import M1Model, normalize_head
from m1local.shards import TensorFiles, Tensors
from m1local_quantize.evaluate import Divergence, Sample, Tally
from m1local_quantize.source import Source
from m1local_quantize.text import Text

ROWS_OF_HEAD = 4096  # at a time, in 32 bits
ROWS_OF_LOGITS = 64  # at a time; a row of the 14B's takes half a megabyte
DIGITS = 5  # significant; the rest differs with the number of threads


@dataclass(frozen=True, slots=True)
class LayerMeasured:
    """Both streams have passed another layer."""

    done: int
    total: int


class Stream:
    """One checkpoint's hidden states over some samples, advanced layer by layer."""

    def __init__(self, config: M1Config, files: Tensors, specs: Mapping[str, LinearSpec]) -> None:
        """Begin before the embedding."""
        with torch.device("meta"):
            self._model = M1Model(config)
        self._files, self._specs = files, specs
        self.hidden: list[Tensor] = []

    @classmethod
    def of_source(cls, source: Source) -> Self:
        """The original."""
        return cls(source.config, source.files, {})

    @classmethod
    def of_checkpoint(cls, folder: Path, config: M1Config, specs: Mapping[str, LinearSpec]) -> Self:
        """A quantized one, finished or about to be."""
        return cls(config, TensorFiles.from_folder(folder), specs)

    def embed(self, samples: Sequence[Sample]) -> None:
        """Look the tokens up; of a 16-bit table only these rows are read."""
        if self._specs.get(EMBEDDING, FLOAT) != FLOAT:
            self._load(EMBEDDING)
            table = self._model.model.embed_tokens
            self.hidden = [table(torch.tensor([sample.token_ids])) for sample in samples]
        else:
            rows = self._files.tensor(f"{EMBEDDING}.weight")
            self.hidden = [rows[torch.tensor([sample.token_ids])].float() for sample in samples]

    def advance(self, layer: int) -> None:
        """Pass layer number `layer` and forget its weights."""
        backbone = self._model.model
        self._load(f"model.layers.{layer}.")
        block = backbone.layers[layer]
        for number, x in enumerate(self.hidden):
            self.hidden[number] = block(x, backbone.chunk(0, x.shape[1], x.device), None)
        backbone.layers[layer] = torch.nn.Identity()

    def finish(self) -> None:
        """Norm the hidden states, and load the head where it is quantized."""
        self._load("model.norm")
        self.hidden = [self._model.model.norm(x) for x in self.hidden]
        if HEAD in self._specs and self._specs[HEAD] != FLOAT:
            self._load(HEAD)

    def logits(self, sample: int, rows: slice) -> Tensor:
        """Logits (n, V) at some positions of a sample, after `finish`."""
        x = self.hidden[sample][0, rows]
        if isinstance(self._model.lm_head, QuantizedLinear):
            logits: Tensor = self._model.lm_head(x).float()
            return logits
        return self._sliced_logits(x)

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


@torch.inference_mode()
def measure(
    reference: Stream, model: Stream, samples: Sequence[Sample], layers: int
) -> Iterator[LayerMeasured | Divergence]:
    """Run both streams over `samples`; the last event is the result."""
    for stream in (reference, model):
        stream.embed(samples)
    for layer in range(layers):
        reference.advance(layer)
        model.advance(layer)
        yield LayerMeasured(layer + 1, layers + 1)
    for stream in (reference, model):
        stream.finish()
    tally = Tally()
    for number, sample in enumerate(samples):
        ids = torch.tensor(sample.token_ids)
        judged = torch.arange(sample.first_judged, len(ids))
        # Parts of equal size: a few rows alone would go through other, coarser operators.
        for part in judged.tensor_split(math.ceil(len(judged) / ROWS_OF_LOGITS)):
            rows = slice(int(part[0]) - 1, int(part[-1]))
            tally.add(reference.logits(number, rows), model.logits(number, rows), ids[part])
    yield LayerMeasured(layers + 1, layers + 1)
    yield tally.result()


def certificate(divergence: Divergence, text: Text) -> dict[str, str | int | float]:
    """What the manifest says."""
    figures = {
        name: value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")
        for name, value in asdict(divergence).items()
    }
    return {"text": text.name, "text_sha256": text.sha256, **figures}


def certify(
    source: Source, folder: Path, specs: Mapping[str, LinearSpec], text: Text
) -> Iterator[LayerMeasured | Divergence]:
    """Measure the checkpoint in `folder` against `source` on `text`.

    Raises CheckpointError where the two are not of the same shape.
    """
    if M1Config.from_file(folder / CONFIG) != source.config:
        raise CheckpointError(
            f"{source.folder} is not the original of {folder}: their {CONFIG} describe different "
            "models. Give the one it was made of."
        )
    model = Stream.of_checkpoint(folder, source.config, specs)
    layers = source.config.num_hidden_layers
    return measure(Stream.of_source(source), model, text.samples, layers)
