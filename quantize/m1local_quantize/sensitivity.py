"""What storing each matrix in fewer bits costs the model's answers: measured, for `fit`.

What it is: the second-order estimate of the KL divergence. Labels are drawn from the original's own
distribution, the gradient g of their log-likelihood is passed back layer by layer, and a matrix W
whose inputs are x costs 1/2 sum g_i^2 (dW x)_i^2 when it is stored as W + dW: the diagonal of the
Fisher information of its outputs. One layer is in memory at a time, with the hidden states of the
text before every layer; the source is read forwards, and then backwards. What it is not: exact; a
cost is that of one matrix alone, and takes errors for small, which those of 3 bits are not quite.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from m1local.checkpoint import EMBEDDING, HEAD, load_modules, matrix_names
from m1local.formats import LinearSpec, format_class
from m1local.formats.slices import ROWS_QUANTIZED, for_slices
from m1local.model import M1Model
from m1local_quantize.evaluate import Sample
from m1local_quantize.methods import quantizer
from m1local_quantize.source import Source
from m1local_quantize.stream import LAYER, ROWS_OF_HEAD, Stream

METHOD = "refit"  # gptq's errors are less, by about the same factor everywhere
SEED = 0
MOST_TOKENS = (
    2048  # of the text; more would change little, and their states are held for all layers
)


@dataclass(frozen=True, slots=True)
class LayerRead:
    """A layer was passed forwards, before any matrix is measured."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class MatrixMeasured:
    """Nats per judged token that a matrix costs in each format that it can be stored in."""

    module: str
    costs: Mapping[LinearSpec, float]
    done: int
    total: int


def measure_sensitivity(
    source: Source, samples: Sequence[Sample], candidates: Sequence[LinearSpec]
) -> Iterator[LayerRead | MatrixMeasured]:
    """Measure every matrix of `source`, from the head to the embedding, in all `candidates`.

    Before that the text passes all layers. Whole samples are used up to MOST_TOKENS tokens, and
    the first in any case. The files of the source must stay: they are read twice.
    """
    measured = _Backwards(source, _first(samples), candidates)
    layers, total = source.config.num_hidden_layers, len(matrix_names(source.config))
    for done in measured.forwards():
        yield LayerRead(done, layers)
    for done, (module, costs) in enumerate(measured.backwards(), 1):
        yield MatrixMeasured(module, costs, done, total)


class _Backwards:
    """The gradient of the drawn labels, on its way from the head to the embedding."""

    def __init__(
        self, source: Source, samples: Sequence[Sample], candidates: Sequence[LinearSpec]
    ) -> None:
        self._source, self._samples, self._candidates = source, samples, candidates
        self._judged = sum(len(s.token_ids) - s.first_judged for s in samples)
        with torch.device("meta"):
            self._model = M1Model(source.config)
        self._states: list[list[Tensor]] = []  # before each layer and the head, of each sample
        self._gradients: list[Tensor] = []  # of each sample, (1, T, C)

    def forwards(self) -> Iterator[int]:
        """Pass all layers; how many were, after each."""
        stream = Stream.of_source(self._source, self._samples)
        stream.advance()
        self._states.append(list(stream.hidden))
        for done in range(1, self._source.config.num_hidden_layers + 1):
            stream.advance()
            self._states.append(list(stream.hidden))
            yield done

    def backwards(self) -> Iterator[tuple[str, Mapping[LinearSpec, float]]]:
        """Every matrix and its costs."""
        yield HEAD, self._pass_head(self._states.pop())
        while self._states:
            before = self._states.pop()
            yield from self._pass_layer(len(self._states), before)
        yield EMBEDDING, self._pass_embedding()

    def _pass_head(self, hidden: list[Tensor]) -> Mapping[LinearSpec, float]:
        """Draw labels; the second moment of their gradient over logits is p (1 - p), exactly."""
        self._load("model.norm")
        head, draw = self._source.tensor(f"{HEAD}.weight"), torch.Generator().manual_seed(SEED)
        inputs, weights = [], torch.empty(self._judged, head.shape[0])
        done = 0
        for sample, state in zip(self._samples, hidden, strict=True):
            x = state.clone().requires_grad_()
            normed = self._model.model.norm(x)[0]
            rows = slice(sample.first_judged - 1, -1)
            judged = normed[rows].detach()
            p = torch.cat([judged @ part.T for part in self._head_slices(head)], 1).softmax(-1)
            labels = p.multinomial(1, generator=draw)
            inputs.append(judged)
            torch.mul(p, 1 - p, out=weights[done : done + len(p)])
            done += len(p)
            towards = p.neg_().scatter_add_(1, labels, torch.ones(labels.shape))
            gradient = torch.zeros(normed.shape)
            start = 0
            for part in self._head_slices(head):
                gradient[rows] += towards[:, start : start + part.shape[0]] @ part
                start += part.shape[0]
            self._gradients += torch.autograd.grad(normed, x, gradient)
        return self._costs(HEAD, torch.cat(inputs), weights)

    def _pass_layer(
        self, layer: int, before: list[Tensor]
    ) -> Iterator[tuple[str, Mapping[LinearSpec, float]]]:
        prefix = f"{LAYER}{layer}."
        self._load(prefix)
        block = self._model.model.layers[layer]
        names = [n for n, module in block.named_modules() if isinstance(module, nn.Linear)]
        inputs: dict[str, list[Tensor]] = {name: [] for name in names}
        weights: dict[str, list[Tensor]] = {name: [] for name in names}
        for number, state in enumerate(before):
            x = state.clone().requires_grad_()
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            hooks = [_note(block.get_submodule(name), name, seen) for name in names]
            output = block(x, self._model.model.chunk(0, x.shape[1], x.device), None)
            for hook in hooks:
                hook.remove()
            outputs = [seen[name][1] for name in names]
            self._gradients[number], *found = torch.autograd.grad(
                output, [x, *outputs], self._gradients[number]
            )
            for name, gradient in zip(names, found, strict=True):
                inputs[name].append(seen[name][0].detach()[0])
                weights[name].append(gradient[0].square())
        self._model.model.layers[layer] = nn.Identity()
        for name in reversed(names):
            found_inputs, found_weights = torch.cat(inputs[name]), torch.cat(weights.pop(name))
            yield f"{prefix}{name}", self._costs(f"{prefix}{name}", found_inputs, found_weights)

    def _pass_embedding(self) -> Mapping[LinearSpec, float]:
        """Only rows that the text contains have a cost."""
        table = self._source.tensor(f"{EMBEDDING}.weight")
        token_ids = torch.tensor([i for sample in self._samples for i in sample.token_ids])
        weights = torch.cat([gradient[0].square() for gradient in self._gradients])
        used, places = torch.unique(token_ids, return_inverse=True)
        rows = table[used].float()
        return {
            spec: float((self._error(rows, spec)[places].square() * weights).sum())
            / (2 * self._judged)
            for spec in self._fitting(EMBEDDING, (table.shape[0], table.shape[1]))
        }

    @torch.inference_mode()
    def _costs(self, module: str, x: Tensor, weights: Tensor) -> Mapping[LinearSpec, float]:
        """Costs of a matrix (N, K) for its inputs (T, K) and gradients squared (T, N)."""
        name = f"{module}.weight"
        whole = self._source.tensor(name)
        fitting = self._fitting(module, (whole.shape[0], whole.shape[1]))

        @torch.inference_mode()  # which a thread does not inherit
        def work(start: int, stop: int) -> list[float]:
            rows = self._source.rows(name, whole, start, stop)
            changes = (x @ self._error(rows, spec).T for spec in fitting)
            return [float((c.square_() * weights[:, start:stop]).sum()) for c in changes]

        sums = zip(*for_slices(work, whole.shape[0], ROWS_QUANTIZED), strict=True)
        return {
            spec: sum(found) / (2 * self._judged) for spec, found in zip(fitting, sums, strict=True)
        }

    def _fitting(self, module: str, shape: tuple[int, int]) -> list[LinearSpec]:
        return [spec for spec in self._candidates if fits(module, shape, spec)]

    @staticmethod
    def _error(rows: Tensor, spec: LinearSpec) -> Tensor:
        """What storing `rows` (n, K) as `spec` changes."""
        shape = (rows.shape[0], rows.shape[1])
        tensors = quantizer(METHOD, spec)(rows, spec)
        return format_class(spec.format).table(tensors, shape, spec).dequantize() - rows

    def _head_slices(self, head: Tensor) -> Iterator[Tensor]:
        name = f"{HEAD}.weight"
        for start in range(0, head.shape[0], ROWS_OF_HEAD):
            stop = min(start + ROWS_OF_HEAD, head.shape[0])
            yield self._source.rows(name, head, start, stop)

    def _load(self, prefix: str) -> None:
        cpu = torch.device("cpu")
        load_modules(self._model, prefix, self._source.files, {}, dtype=torch.float32, device=cpu)


def _first(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Whole samples until there are enough tokens."""
    ends = accumulate(len(sample.token_ids) for sample in samples)
    return samples[: max(1, sum(end <= MOST_TOKENS for end in ends))]


def fits(module: str, shape: tuple[int, int], spec: LinearSpec) -> bool:
    """Whether the matrix `module` can be stored as `spec`."""
    chosen = format_class(spec.format)
    return chosen.check(*shape, spec) is None and (module != EMBEDDING or chosen.gathers)


def _note(
    linear: nn.Module, name: str, seen: dict[str, tuple[Tensor, Tensor]]
) -> "torch.utils.hooks.RemovableHandle":
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (inputs[0], output)

    return linear.register_forward_hook(hook)
