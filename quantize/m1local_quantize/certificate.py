"""The quality certificate: a checkpoint measured against its original, layer by layer.

What it is: two streams of hidden states over the same text, one through the 16-bit layers and one
through the quantized ones; each layer is loaded, passed by both and dropped, so that no model is
ever whole in memory, and a source may be dropped behind them. The figures are those of
`evaluate.compare` on loaded models. What it is not: a promise about answers; the text is short,
and named beside the figures.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from m1local.checkpoint import CONFIG
from m1local.config import M1Config
from m1local.errors import CheckpointError
from m1local.formats import LinearSpec
from m1local.shards import TensorFiles, Tensors
from m1local_quantize.evaluate import Divergence, Tally
from m1local_quantize.source import Source
from m1local_quantize.stream import Stream
from m1local_quantize.text import Text

ROWS_OF_LOGITS = 64  # at a time; a row of the 14B's takes half a megabyte
DIGITS = 5  # significant; the rest differs with the number of threads


@dataclass(frozen=True, slots=True)
class StageMeasured:
    """Both streams have passed the embedding, another layer, or the end."""

    done: int
    total: int


class Measurement:
    """The original and a quantized checkpoint, passed by the same text side by side."""

    def __init__(
        self, source: Source, quantized: Tensors, specs: Mapping[str, LinearSpec], text: Text
    ) -> None:
        """Begin before the embedding; `quantized` may still be being written."""
        self._text = text
        self._streams = {
            "original": Stream.of_source(source, text.samples),
            "quantized": Stream(source.config, quantized, specs, text.samples),
        }

    @property
    def passed(self) -> int:
        """How many stages both streams have passed."""
        return min(stream.passed for stream in self._streams.values())

    def advance(self) -> None:
        """Pass the next stage, whose tensors must be at hand in both."""
        for stream in self._streams.values():
            stream.advance()

    def save(self, path: Path) -> None:
        """Keep the hidden states, so that what was passed is never needed again."""
        tensors = {
            f"{name}.{number}": hidden
            for name, stream in self._streams.items()
            for number, hidden in enumerate(stream.hidden)
        }
        metadata = {"passed": str(self.passed), "text_sha256": self._text.sha256}
        unfinished = path.with_name(f"{path.name}.part")
        with unfinished.open("wb") as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())  # what it came of may be deleted next
        unfinished.replace(path)

    def restore(self, path: Path) -> bool:
        """Go on from what `save` kept of the same text; False where there is nothing of use."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                if metadata["text_sha256"] != self._text.sha256:
                    return False
                for name, stream in self._streams.items():
                    count = len(self._text.samples)
                    stream.hidden = [file.get_tensor(f"{name}.{i}").clone() for i in range(count)]
                    stream.passed = int(metadata["passed"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        return True

    @torch.inference_mode()
    def result(self) -> Divergence:
        """The figures, after the last stage."""
        original, quantized = self._streams["original"], self._streams["quantized"]
        tally = Tally()
        for number, sample in enumerate(self._text.samples):
            ids = torch.tensor(sample.token_ids)
            judged = torch.arange(sample.first_judged, len(ids))
            # Parts of equal size: a few rows alone would go through other, coarser operators.
            for part in judged.tensor_split(math.ceil(len(judged) / ROWS_OF_LOGITS)):
                rows = slice(int(part[0]) - 1, int(part[-1]))
                wanted, found = original.logits(number, rows), quantized.logits(number, rows)
                tally.add(wanted, found, ids[part])
        return tally.result()


def certificate(divergence: Divergence, text: Text) -> dict[str, str | int | float]:
    """What the manifest says."""
    figures = {
        name: value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")
        for name, value in asdict(divergence).items()
    }
    return {"text": text.name, "text_sha256": text.sha256, **figures}


def certify(
    source: Source, folder: Path, specs: Mapping[str, LinearSpec], text: Text
) -> Iterator[StageMeasured | Divergence]:
    """Measure the checkpoint in `folder` against `source` on `text`.

    Raises CheckpointError where the two are not of the same shape.
    """
    if M1Config.from_file(folder / CONFIG) != source.config:
        raise CheckpointError(
            f"{source.folder} is not the original of {folder}: their {CONFIG} describe different "
            "models. Give the one it was made of."
        )
    measurement = Measurement(source, TensorFiles.from_folder(folder), specs, text)
    stages = source.config.num_hidden_layers + 2
    for done in range(stages):
        measurement.advance()
        yield StageMeasured(done + 1, stages)
    yield measurement.result()
