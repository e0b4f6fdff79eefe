"""The parts of bench/gpu.py: what is measured on a card, each by itself.

What it is: the bandwidth of a copy; every format's product against the dequantized matrix; decode
and prompts of a model of random weights; other libraries' products on matrices of the same sizes;
and what the plan finds under a hard cap. What it is not: the order of the parts, their time, or the
table, which are gpu.py's. On the CPU, in tests, the kernels run in Triton's interpreter.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.gpu_model import FORMATS, M1_14B, filled_cache, random_matrix, random_model, specs
from m1local.checkpoint import compute_dtype
from m1local.config import M1Config
from m1local.cuda import int4pack
from m1local.cuda.card import Card
from m1local.formats.bnb import bitsandbytes
from m1local.kv_store import BYTES, FLOAT
from m1local.memory import CARD_CHUNK, Model, Setting, bandwidth, free_bytes, settle
from m1local.model import M1Model
from m1local.placement import Placement, settled
from m1local.sampling import SamplingParams

WHOLE = "bf16"  # the name of the model whose matrices are as they were
MOST_ERROR = 0.02
TOGETHER = 8  # steps that are timed as one
WARMING = 3  # tokens of an answer before the first that counts: graphs are captured
DRAWN = SamplingParams(temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05, seed=1)
CAPPED = (Setting(8192), Setting(2048, BYTES))


@dataclass(frozen=True)
class Subject:
    """What is measured, and how often; the defaults are the 14B.

    `shapes` says how often each matrix but embedding and head occurs. `caches` is what the copies
    of a matrix fill together, so that none is read from a cache.
    """

    device: torch.device
    config: M1Config = M1_14B
    contexts: tuple[int, ...] = (128, 4096, 16384, 32640)
    prompt: int = 2048
    chunk: int = CARD_CHUNK
    repeats: int = 20
    warm_ups: int = 3
    warm_seconds: float = 0.2  # at least: an idle card's clocks rise slowly
    answer: int = 64
    copied: int = 1 << 30
    caches: int = 256 << 20
    cap: int = int(7.2 * 2**30)
    shapes: Mapping[tuple[int, int], int] = field(
        default_factory=lambda: {
            (6144, 5120): 20, (7168, 5120): 20, (5120, 5120): 40, (17408, 5120): 80,
            (5120, 17408): 40,
        }
    )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return compute_dtype(self.device)

    def setting(self, tokens: int, kv_type: str = FLOAT) -> Setting:
        """A setting of at most so many tokens."""
        longest = self.config.max_position_embeddings
        return Setting(min(tokens, longest), kv_type, max_chunk=self.chunk)

    def planned(self, name: str) -> Model:
        """What the plan knows of the model in the format `name`."""
        return Model(self.config, specs(self.config, name), self.dtype)


def milliseconds(
    work: Callable[[], object], subject: Subject, most: int = 20, together: int = 1
) -> float:
    """The median of `work`'s time, of at most `most` runs, on a card by its own clock.

    So many runs are timed `together`, since in an answer a step is launched behind the one before.
    """
    on_card, times, begun = subject.device.type == "cuda", [], time.perf_counter()
    warmed = 0
    while warmed < subject.warm_ups or time.perf_counter() - begun < subject.warm_seconds:
        work()
        warmed += 1
        if on_card:
            torch.cuda.synchronize()
    for _ in range(min(most, subject.repeats)):
        if not on_card:
            begun = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - begun))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(together):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / together)
    return float(statistics.median(times))


def copy(subject: Subject) -> dict[str, Any]:
    """Bytes per second that a copy reads and writes."""
    return {"gb_per_second": bandwidth(subject.device, subject.copied) / 1e9}


def check_kernels(subject: Subject) -> dict[str, Any]:
    """Relative error of each format's product for 1, 5 and many rows, and which are `wrong`."""
    found: dict[str, Any] = {"wrong": []}
    for name in FORMATS:
        try:
            errors = _errors(name, subject)
        except Exception as error:  # the other formats may work all the same
            found["wrong"].append(f"{name}: {type(error).__name__}: {error}"[:200])
            continue
        found |= errors
        found["wrong"] += [what for what, error in errors.items() if not error < MOST_ERROR]
    return found


def _errors(name: str, subject: Subject) -> dict[str, float]:
    width, device = subject.config.hidden_size, subject.device
    module = random_matrix((width, width), FORMATS[name], device)
    whole, errors = module.dequantize().float(), {}
    for rows in (1, 5, subject.chunk):
        x = torch.randn((rows, width), device=device).to(subject.dtype)
        wanted = x.float() @ whole.T
        error = float((module(x).float() - wanted).norm() / wanted.norm())
        errors[f"{name}, {rows} rows"] = round(error, 5)
    return errors


def decode(name: str, kv_type: str, subject: Subject) -> dict[str, Any]:
    """Decode in the format `name`, at each context that fits, as a graph and without."""
    from m1local.cuda.decode import Decoder, Replay

    device, planned = subject.device, subject.planned(name)
    free, rows = free_bytes(device), []
    fitting = [n for n in subject.contexts if _takes(planned, subject, n, kv_type) <= free]
    if not fitting:
        return {"rows": [], "left_out": list(subject.contexts)}
    speed = bandwidth(device, subject.copied)
    setting = _with_room(subject, max(fitting), kv_type)
    placement = Placement(device, 0, False, setting)
    model = random_model(subject.config, name, placement, subject.dtype)
    step = Decoder(model, filled_cache(subject.config, placement, 0)).step
    replay = Replay(step, device)
    for context in fitting:
        at = partial(_at, step.position, context)
        graph = milliseconds(partial(at, replay), subject, together=TOGETHER)
        plain = milliseconds(partial(at, step), subject, together=TOGETHER)
        read = planned.demand(replace(setting, context_tokens=context), device).read
        rows.append(
            {
                "format": name, "kv_type": kv_type, "context": context, "graph_ms": graph,
                "plain_ms": plain, "why_no_graph": replay.reason, "tokens_per_second": 1000 / graph,
                "gb_per_second": read / graph / 1e6,
                "percent_of_copy": 100 * read / graph * 1000 / speed,
            }
        )  # fmt: skip
    return {"rows": rows, "left_out": [n for n in subject.contexts if n not in fitting]}


def serial(subject: Subject) -> dict[str, Any]:
    """Decode in int4 at the first context, each kernel beginning when the one before has ended."""
    with patch.object(Card, "overlaps", False):
        found = decode("int4", FLOAT, replace(subject, contexts=subject.contexts[:1]))
    rows = [row | {"format": "int4 serial"} for row in found["rows"]]
    return found | {"rows": rows}


def _with_room(subject: Subject, context: int, kv_type: str) -> Setting:
    """A setting whose context has a slot more, for the token that is measured."""
    return subject.setting(context + 1, kv_type)


def _takes(planned: Model, subject: Subject, context: int, kv_type: str) -> int:
    demand = planned.demand(_with_room(subject, context, kv_type), subject.device)
    return demand.device + demand.runtime


def _at(position: Tensor, context: int, work: Callable[[], None]) -> None:
    """One step at the end of so long a context."""
    position.fill_(context)
    work()


def prompt(name: str, subject: Subject) -> dict[str, Any]:
    """A prompt, an answer after it, and the peak of memory with 8k of context, graphs and all."""
    device, setting = subject.device, subject.setting(8192)
    planned = subject.planned(name).demand(setting, device)
    if planned.device + planned.runtime > free_bytes(device):
        return {"format": name, "left_out": "it does not fit into this card"}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    placement = Placement(device, 0, False, setting)
    model = random_model(subject.config, name, placement, subject.dtype)
    found = {"format": name, **_read_and_answer(model, placement, subject)}
    found |= {"peak_planned": planned.device, "runtime_planned": planned.runtime}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.max_memory_reserved()
        context = total - free - torch.cuda.memory_reserved()
        found |= {
            "peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": reserved,
            "context_bytes": context, "peak_on_the_card": reserved + context,
            "percent_of_plan": 100 * reserved / planned.device,
        }  # fmt: skip
    return found


def _read_and_answer(model: M1Model, placement: Placement, subject: Subject) -> dict[str, Any]:
    """Milliseconds of a prompt, and tokens per second of an answer drawn on the card behind it."""
    from m1local.cuda.drawing import CardSampler, DrawingDecoder

    vocab_size = subject.config.vocab_size
    cache = filled_cache(subject.config, placement, 0)
    ids = torch.randint(0, vocab_size, (1, subject.prompt), device=subject.device)

    def read() -> None:
        cache.position = 0
        for start in range(0, subject.prompt, subject.chunk):
            model(ids[:, start : start + subject.chunk], cache, last_only=True)

    taken = milliseconds(read, subject, 3)
    decoder = DrawingDecoder(model, cache)
    sampler = decoder.sampler(DRAWN, vocab_size)
    assert isinstance(sampler, CardSampler)
    logits = decoder.feed(5)
    for step in range(WARMING + subject.answer):
        if step == WARMING:
            begun = time.perf_counter()
        logits = decoder.feed(sampler(logits))
    speed = subject.answer / (time.perf_counter() - begun)  # each draw waits for the card
    why = decoder.reason or sampler.reason
    return {"prompt_ms": taken, "answer_tokens_per_second": speed, "why_no_graph": why}


Multiply = Callable[[tuple[int, int], Tensor], Callable[[], object]]  # a matrix's shape, and x


def peers(subject: Subject) -> dict[str, dict[str, Any]]:
    """Milliseconds that a token's matrices take, but for the head; and a prompt's in bfloat16."""
    found: dict[str, dict[str, Any]] = {}
    ways: dict[str, tuple[Multiply, float]] = {  # with the bits of a weight
        **{f"m1local {name}": (partial(_ours, name), 8 if name == "int8" else 4)
           for name in FORMATS},
        "bitsandbytes NF4": (_nf4, 4), "int4pack": (_pack, 4), "bf16 cuBLAS": (_bf16, 16),
    }  # fmt: skip
    for name, (multiply, bits) in ways.items():
        try:
            found[name] = _all(multiply, bits, 1, subject, "token_ms")
        except Exception as error:  # a peer that fails here is a finding, not the end
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
    chunks = -(-subject.prompt // subject.chunk)
    chunk = _all(_bf16, 16, subject.chunk, subject, "chunk_ms")
    found["bf16 cuBLAS"]["prompt_ms"] = chunks * chunk["chunk_ms"]
    return found


def _all(multiply: Multiply, bits: float, rows: int, subject: Subject, name: str) -> dict[str, Any]:
    """Milliseconds of all of a token's products; and why one was launched without a graph."""
    total, reasons = 0.0, set()
    for shape, count in subject.shapes.items():
        taken, reason = _timed(multiply, shape, bits, rows, subject)
        total += count * taken
        reasons.add(reason)
    return {name: total, "why_no_graph": "; ".join(sorted(reasons - {""}))}


def _timed(
    multiply: Multiply, shape: tuple[int, int], bits: float, rows: int, subject: Subject
) -> tuple[float, str]:
    """Milliseconds of one product: of many on copies of the matrix, launched as one graph."""
    from m1local.cuda.decode import Replay

    device = subject.device
    copies = max(1, -(-subject.caches // int(shape[0] * shape[1] * bits / 8)))
    x = torch.randn((rows, shape[1]), device=device).to(subject.dtype)
    products = [multiply(shape, x) for _ in range(copies)]

    def work() -> None:
        for product in products:
            product()

    replay = Replay(work, device)
    return milliseconds(replay, subject) / copies, replay.reason


def _ours(name: str, shape: tuple[int, int], x: Tensor) -> Callable[[], object]:
    """As a step multiplies: x lies as the kernel reads it, and who reads the parts sums them."""
    from m1local.cuda.activation import Activation
    from m1local.cuda.one_row import vector_product

    matrix = random_matrix(shape, FORMATS[name], x.device).on_card()
    assert matrix is not None
    row = Activation.of(x)
    return lambda: vector_product(row, matrix)


def _bf16(shape: tuple[int, int], x: Tensor) -> Callable[[], object]:
    weight = torch.randn(shape, device=x.device).to(x.dtype)
    return lambda: x @ weight.T


def _nf4(shape: tuple[int, int], x: Tensor) -> Callable[[], object]:
    module = random_matrix(shape, FORMATS["nf4"], x.device)
    assert bitsandbytes()
    inner: Callable[[Tensor], object] = module.inner  # type: ignore[assignment]  # a Linear4bit
    return lambda: inner(x)


def _pack(shape: tuple[int, int], x: Tensor) -> Callable[[], object]:
    rows, columns = shape
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=x.device)
    packed = int4pack.pack(codes)
    scales = torch.ones((columns // 64, rows, 2), dtype=torch.bfloat16, device=x.device)
    return lambda: int4pack.multiply(x, packed, 64, scales)


def capped(subject: Subject) -> list[dict[str, Any]]:
    """What the plan finds for int4 under the hard cap, and how fast it runs."""
    device = subject.device
    runtime = subject.planned("int4").demand(subject.setting(8192), device).runtime
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((subject.cap - runtime) / total, device)
    wanted = [subject.setting(one.context_tokens, one.kv_type) for one in CAPPED]
    return [_under(subject, one, subject.cap - runtime) for one in wanted]


def _under(subject: Subject, wanted: Setting, room: int) -> dict[str, Any]:
    from m1local.cuda.decode import Decoder

    device, layers = subject.device, subject.config.num_hidden_layers
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    placement = settled(settle(subject.planned("int4"), wanted, device, room), layers, device)
    found: dict[str, Any] = {
        "context": wanted.context_tokens, "kv_type": wanted.kv_type,
        "gpu_layers": layers - placement.first, "embedding_on_host": placement.embedding_on_host,
    }  # fmt: skip
    model = random_model(subject.config, "int4", placement, subject.dtype)
    decoder = Decoder(model, filled_cache(subject.config, placement, 64), placement.first)
    taken = milliseconds(lambda: decoder.feed(5), subject, 8)
    found["tokens_per_second"] = 1000 / taken
    if device.type == "cuda":
        found["peak_reserved"] = torch.cuda.max_memory_reserved()
    return found


PARTS: dict[str, Callable[[Subject], object]] = {  # the most telling first: time may be up
    "copy": copy,
    "kernels": check_kernels,
    "decode int4": partial(decode, "int4", FLOAT),
    "decode int4 serial": serial,
    "prompt int4": partial(prompt, "int4"),
    "peers": peers,
    "prompt bf16": partial(prompt, WHOLE),
    "capped": capped,
    "decode nf4": partial(decode, "nf4", FLOAT),
    "decode int8": partial(decode, "int8", FLOAT),
    "decode int4 q8_0": partial(decode, "int4", BYTES),
    "prompt nf4": partial(prompt, "nf4"),
    "prompt int8": partial(prompt, "int8"),
    "decode bf16": partial(decode, WHOLE, FLOAT),
}
