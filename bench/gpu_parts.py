"""The parts of bench/gpu.py: what is measured on a card, each by itself.

What it is: the bandwidth of a copy; every format's product against the dequantized matrix; decode
and prompts of a model of random weights; where the time of a step goes; and what the plan finds
under a hard cap. What it is not: the order of the parts, their time, or the table, which are
gpu.py's. On the CPU, in tests, the kernels run in Triton's interpreter.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.gpu_model import FORMATS, filled_cache, random_matrix, random_model
from bench.gpu_peers import peers
from bench.gpu_shapes import shapes
from bench.gpu_subject import Subject, milliseconds
from m1local.cuda.card import Card
from m1local.formats.groups import GroupLinear
from m1local.kv_store import BYTES, FLOAT
from m1local.memory import Model, Setting, bandwidth, free_bytes, settle
from m1local.model import M1Model
from m1local.placement import Placement, settled
from m1local.sampling import SamplingParams

if TYPE_CHECKING:  # Triton, which is only there with a card
    from m1local.cuda.decode import DecodeStep
    from m1local.cuda.replay import Replay

WHOLE = "bf16"  # the name of the model whose matrices are as they were
MOST_ERROR = 0.02
TOGETHER = 8  # steps that are timed as one
WARMING = 3  # tokens of an answer before the first that counts: graphs are captured
DRAWN = SamplingParams(temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05, seed=1)
WITHOUT = {
    "serial": (Card, "overlaps", False),  # each kernel begins when the one before has ended
    "unasked": (Card, "ahead", 0),  # no weights are asked for before their kernel
    "untiled": (GroupLinear, "tile", lambda module: None),  # scales and zeros are as stored
}
CAPPED = (Setting(8192), Setting(2048, BYTES))


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

    device, planned = subject.device, subject.planned(name)
    free, rows = free_bytes(device), []
    fitting = [n for n in subject.contexts if _takes(planned, subject, n, kv_type) <= free]
    if not fitting:
        return {"rows": [], "left_out": list(subject.contexts)}
    speed = bandwidth(device, subject.copied)
    setting = _with_room(subject, max(fitting), kv_type)
    step, replay = _step(name, setting, subject)
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


def _step(name: str, setting: Setting, subject: Subject) -> tuple["DecodeStep", "Replay"]:
    """The step of a model of random weights, and what launches it again and again."""
    from m1local.cuda.decode import Decoder
    from m1local.cuda.replay import Replay

    placement = Placement(subject.device, 0, setting)
    model = random_model(subject.config, name, placement)
    step = Decoder(model, filled_cache(subject.config, placement, 0)).step
    return step, Replay(step, subject.device)


def profile(subject: Subject) -> dict[str, Any]:
    """Where the time of a step in int4 goes: each kernel's microseconds a token, and how many.

    Kernels overlap, so they may be more together than the step.
    """
    from torch.profiler import ProfilerActivity

    context, steps = subject.contexts[0], min(TOGETHER, subject.repeats)
    step, replay = _step("int4", _with_room(subject, context, FLOAT), subject)
    _at(step.position, context, replay)
    kinds = [ProfilerActivity.CPU]
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
        kinds.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(steps):
            _at(step.position, context, replay)
        if subject.device.type == "cuda":
            torch.cuda.synchronize()
    kernels = [
        {"kernel": event.key[:60], "times": event.count / steps,
         "microseconds": event.self_device_time_total / steps}
        for event in seen.key_averages() if event.device_type.name == "CUDA"
    ]  # fmt: skip
    return {"kernels": sorted(kernels, key=lambda kernel: -kernel["microseconds"])}


def without(name: str, subject: Subject) -> dict[str, Any]:
    """Decode in int4 at the first context, without what WITHOUT says."""
    with patch.object(*WITHOUT[name]):
        found = decode("int4", FLOAT, replace(subject, contexts=subject.contexts[:1]))
    rows = [row | {"format": f"int4 {name}"} for row in found["rows"]]
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
    placement = Placement(device, 0, setting)
    model = random_model(subject.config, name, placement)
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
        "gpu_layers": layers - placement.first,
    }  # fmt: skip
    model = random_model(subject.config, "int4", placement)
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
    **{f"decode int4 {name}": partial(without, name) for name in WITHOUT},
    "profile": profile,
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
    "shapes": shapes,
}
