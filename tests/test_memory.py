"""The memory plan: the numbers of the architecture's description, and what is really allocated."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu_model import M1_14B
from m1local import memory
from m1local.advice import check, next_step, telling
from m1local.cache import DEFAULT_MAX_CHUNK, KVCache
from m1local.checkpoint import expected_tensors
from m1local.config import M1Config
from m1local.context import Context, Decoder
from m1local.cuda import support
from m1local.cuda.transfer import aligned
from m1local.errors import MemoryLimitError
from m1local.formats import LinearSpec, format_class
from m1local.formats.base import Stored
from m1local.memory import (
    Model,
    Setting,
    bandwidth,
    cache_bytes,
    options,
    settle,
    suited,
)
from m1local.model import M1Model
from tests.conftest import TINY, random_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


def stored_as(config: M1Config, format_: str, group: int | None = None) -> dict[str, LinearSpec]:
    from m1local.checkpoint import matrix_names

    return dict.fromkeys(matrix_names(config), LinearSpec(format_, group))


@pytest.mark.parametrize("tokens", [1, 2048, 8192, 8193, 32768])
def test_keys_and_values_take_what_the_description_says(tokens: int) -> None:
    wanted = 40_960 * tokens + 81_920 * min(tokens, 8192) + 122_880
    assert cache_bytes(M1_14B, tokens) == wanted


def test_weights_take_what_the_description_says() -> None:
    assert Model(M1_14B, {}, torch.bfloat16).weights == 28_941_528_640
    for format_, group, gib in (("int8", None, 13.5), ("int4", 64, 7.58)):
        model = Model(M1_14B, stored_as(M1_14B, format_, group), torch.bfloat16)
        assert model.weights / GIB == pytest.approx(gib, abs=0.02)


def test_a_token_reads_what_the_description_says() -> None:
    setting = Setting(16)
    for specs, gigabytes in (
        ({}, 27.58),
        (stored_as(M1_14B, "int8"), 13.8),
        (stored_as(M1_14B, "int4", 64), 7.76),
    ):
        demand = Model(M1_14B, specs, torch.bfloat16).demand(setting, CUDA)
        assert demand.read / 1e9 == pytest.approx(gigabytes, abs=0.02)
        assert demand.tokens_per_second(360e9, 1) == pytest.approx(360e9 / demand.read)


def test_what_stays_on_the_host_is_not_on_the_card() -> None:
    model = Model(M1_14B, stored_as(M1_14B, "int4", 64), torch.bfloat16)
    whole = model.demand(Setting(8192), CUDA)
    embedding = model.parts["model.embed_tokens"]
    assert whole.host == 576 << 20  # 512 + 2 * 32: pinned memory comes in powers of two
    assert embedding < 0.8 * whole.host
    assert whole.host_read == 0  # it is never read whole
    assert whole.weights == model.weights - embedding
    alone = model.demand(Setting(8192), torch.device("cpu"))
    assert alone.weights == model.weights
    assert alone.read == whole.read
    half = model.demand(Setting(8192, gpu_layers=20), CUDA)
    assert half.weights + half.host - model.weights == pytest.approx(whole.cache / 2, rel=0.01)
    assert half.read + half.host_read == whole.read
    none = model.demand(Setting(8192, gpu_layers=0), CUDA)
    assert none.device == none.read == 0
    assert none.host == model.weights + whole.cache
    assert none.host_read == whole.read


def test_layers_beside_a_card_take_the_type_that_the_processor_computes_in() -> None:
    setting = Setting(8192, gpu_layers=20)
    same, wider = (Model(M1_14B, {}, torch.bfloat16, host) for host in (None, torch.float32))
    narrow, wide = (model.demand(setting, CUDA) for model in (same, wider))
    assert wide.host == 2 * narrow.host  # a checkpoint that is not quantized
    assert wide.host_read == 2 * narrow.host_read  # keys and values, too
    assert (wide.device, wide.read) == (narrow.device, narrow.read)
    none = wider.demand(replace(setting, gpu_layers=0), CUDA)
    assert none.host > 2 * wider.weights


def test_the_first_setting_that_fits_is_taken() -> None:
    model = Model(M1_14B, stored_as(M1_14B, "int4", 64), torch.bfloat16)
    wanted = Setting(8192)
    needed = [model.demand(setting, CUDA).device for setting in options(wanted, 40)]
    assert needed == sorted(needed, reverse=True)
    assert settle(model, wanted, CUDA, needed[0]) == wanted
    assert settle(model, wanted, CUDA, needed[0] - 1).gpu_layers == 39
    assert settle(model, wanted, CUDA, needed[8]).gpu_layers == 32
    assert settle(model, wanted, CUDA, 100 << 20).gpu_layers == 0
    large = replace(wanted, max_chunk=memory.CARD_CHUNK)  # which is a card's
    assert settle(model, large, CUDA, 100 << 20) == replace(wanted, gpu_layers=0)
    check(model, wanted, CUDA, needed[0])
    with pytest.raises(MemoryLimitError, match=r"on the card, 0\.1 GiB are free\. Try --gpu"):
        check(model, wanted, CUDA, 100 << 20)


def test_a_cap_below_eight_gigabytes_has_a_setting() -> None:
    model = Model(M1_14B, stored_as(M1_14B, "int4", 64), torch.bfloat16)
    cap = int(7.2 * GIB) - model.demand(Setting(8192), CUDA).runtime
    found = settle(model, Setting(8192), CUDA, cap)
    assert (found.gpu_layers or 0) > 20
    assert model.demand(found, CUDA).device <= cap


def test_the_next_step_names_an_option_each_time() -> None:
    steps = [
        Setting(8192), Setting(2048), Setting(2048, gpu_layers=20), Setting(2048, gpu_layers=4),
        Setting(2048, gpu_layers=0),
    ]  # fmt: skip
    said = [next_step(step) for step in steps]
    for text, option in zip(
        said,
        ("--ctx-size 4096", "--gpu-layers 32", "--gpu-layers 12", "--gpu-layers 0", "m1 plan"),
        strict=True,
    ):
        assert option in text


def test_a_failed_allocation_becomes_advice() -> None:
    said = r"kept\. Try a smaller context: --ctx-size 4096"
    short = Setting(8192)
    for error in (
        torch.OutOfMemoryError(), RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):  # fmt: skip
        with pytest.raises(MemoryLimitError, match=said), telling(short):
            raise error
    with pytest.raises(RuntimeError, match="misaligned"), telling(short):
        raise RuntimeError("CUDA error: misaligned address")


def test_no_room_for_a_decoder_becomes_advice(tiny_model: M1Model) -> None:
    def full(cache: KVCache) -> Decoder:
        raise torch.OutOfMemoryError

    cache = KVCache.allocate(tiny_model.config, 64, dtype=torch.float32)
    with pytest.raises(MemoryLimitError, match="Try fewer layers on the card: --gpu-layers 32"):
        assert Context(tiny_model, cache, full).decoder


def test_what_libraries_take_later_is_left_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8 * GIB)
    assert memory.room(CUDA) == 8 * GIB - memory.LIBRARY_BYTES
    assert memory.room(CPU) == 8 * GIB
    assert memory.room(CUDA, GIB) == GIB - memory.LIBRARY_BYTES
    untouched = memory.room(CUDA, GIB, untouched=True)
    assert untouched == GIB - memory.LIBRARY_BYTES - memory.CONTEXT_BYTES


class CardAllocator:
    """What torch's allocator reserves on a card for allocations of which none is freed.

    Up to 1 MiB they share pieces of 2 MiB, up to 10 MiB pieces of 20; larger ones have whole MiB of
    their own, in twos, of which more than 1 MiB that is left serves others.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self.left: dict[bool, list[int]] = {True: [], False: []}  # of small and large pieces

    def __call__(self, nbytes: int) -> None:
        size = -(-nbytes // 512) * 512
        small, pieces = size <= 1 << 20, self.left[size <= 1 << 20]
        fitting = [piece for piece in pieces if piece >= size]
        if fitting:
            piece = min(fitting)
            pieces.remove(piece)
        else:
            shared = 2 << 20 if small else 20 << 20
            piece = shared if size < 10 << 20 else -(-size // (2 << 20)) * (2 << 20)
            self.reserved += piece
        if piece - size >= (512 if small else (1 << 20) + 1):
            pieces.append(piece - size)


@pytest.mark.parametrize(("format_", "group"), [("int4", 64), ("int8", None), ("bnb-nf4", None)])
@pytest.mark.parametrize("on_card", [40, 30])
def test_a_card_s_allocator_takes_what_is_planned(
    format_: str, group: int | None, on_card: int
) -> None:
    specs, allocate = stored_as(M1_14B, format_, group), CardAllocator()
    for end in ("model.embed_tokens", "lm_head"):
        specs[end] = LinearSpec("int8")
    setting = Setting(8192, gpu_layers=on_card)
    demand = Model(M1_14B, specs, torch.bfloat16).demand(setting, CUDA)
    first = 40 - on_card
    for layer in memory.layer_caches(M1_14B, setting, torch.bfloat16)[first:]:
        for tensor in (*layer.k.tensors, *layer.v.tensors, layer.raw_k, layer.raw_v):
            allocate(tensor.nbytes)
    together = 0
    for name, stored in expected_tensors(M1_14B, specs).items():
        part, number = name.split(".")[:2], name.split(".")[2:3]
        if "embed_tokens" in part or (".layers." in name and int(number[0]) < first):
            continue
        found = stored if isinstance(stored, Stored) else Stored(stored, torch.bfloat16)
        together += aligned(found.nbytes)
    allocate(together)
    planned = demand.weights + demand.cache + demand.gaps
    assert planned == pytest.approx(allocate.reserved, rel=0.011)
    assert demand.gaps < 0.01 * planned  # each tensor by itself would leave 3 %


def test_a_card_reads_prompts_in_larger_chunks_where_it_has_room() -> None:
    model = Model(M1_14B, stored_as(M1_14B, "int4", 64), torch.bfloat16)
    wanted = suited(Setting(8192), CUDA)
    assert suited(Setting(8192), CPU) == Setting(8192)
    needed = [model.demand(setting, CUDA).device for setting in options(wanted, 40)]
    assert needed == sorted(set(needed), reverse=True)
    chunks = [setting.max_chunk for setting in options(wanted, 40)]
    assert chunks == [memory.CARD_CHUNK] + [DEFAULT_MAX_CHUNK] * 40
    smaller = settle(model, wanted, CUDA, needed[1])
    assert (smaller.max_chunk, smaller.gpu_layers) == (DEFAULT_MAX_CHUNK, None)


def test_where_triton_is_missing_the_plan_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(M1_14B, stored_as(M1_14B, "int4", 64), torch.bfloat16)
    wanted = Setting(32768)
    kernels = model.demand(wanted, CUDA)
    with monkeypatch.context() as patched:
        patched.setattr(memory, "by_kernels", lambda card: False)
        plain = model.demand(wanted, CUDA)
        assert suited(wanted, CUDA) == wanted  # attention of more tokens would fill the card
    assert plain.gaps - kernels.gaps > 200 << 20  # each tensor is allocated by itself
    assert plain.workspace > kernels.workspace  # a mask
    assert plain.host == model.parts["model.embed_tokens"] < kernels.host  # nothing is pinned
    assert memory.by_kernels(CUDA) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for usable in (True, False):
        monkeypatch.setattr(support, "usable", lambda card, usable=usable: usable)
        assert memory.by_kernels(CUDA) is usable


class Accountant(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is untyped
    """Counts the bytes of all storages that operators make on a device, while they live."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.known: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return found

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != self.device or key in self.known:
            return
        self.known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


def quantized(config: M1Config, specs: dict[str, LinearSpec]) -> M1Model:
    """A model whose matrices are stored by `specs`, made as the loader makes it."""
    from m1local.checkpoint import EMBEDDING
    from m1local.formats.base import QuantizedEmbedding

    model = random_model(config)
    for name, spec in specs.items():
        weight = model.get_submodule(name).get_parameter("weight")
        shape = (weight.shape[0], weight.shape[1])
        chosen = format_class(spec.format)
        tensors = chosen.quantize(weight, spec)
        parent, _, child = name.rpartition(".")
        module: torch.nn.Module = chosen.table(tensors, shape, spec)
        if name == EMBEDDING:
            module = QuantizedEmbedding(module, torch.float32)  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), child, module)
    return model


MIDDLE = TINY | {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "sliding_window": 64,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize("format_", ["float", "int8", "int4"])
def test_the_peak_is_the_predicted_one(format_: str) -> None:
    config = M1Config.from_dict(MIDDLE)
    specs = {} if format_ == "float" else stored_as(config, format_, {"int4": 64}.get(format_))
    setting = Setting(256, max_chunk=64, rewind_tokens=32)
    planned = Model(config, specs, torch.float32).demand(setting, CPU)
    model = quantized(config, specs)
    accountant = Accountant()
    held = [*model.parameters(), *model.buffers()]
    for tensor in held:
        accountant.count(tensor)
    with accountant, torch.inference_mode():
        cache = KVCache.allocate(config, 256, dtype=torch.float32, max_chunk=64, rewind_tokens=32)
        for start in range(0, 256, 64):
            model(torch.arange(start, start + 64)[None], cache, last_only=True)
    assert planned.device == pytest.approx(accountant.peak, rel=0.05)


def test_a_card_s_own_clock_tells_its_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    took, recorded = iter([9.0] * 3 + [2.0] * memory.TRIES), list[object]()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            recorded.append(self)

        def synchronize(self) -> None:
            assert recorded[-1] is self

        def elapsed_time(self, end: object) -> float:
            return next(took)

    seconds = iter([0.0, 0.1, 0.2, 0.29, 0.3])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    found = memory._copy_bandwidth(CPU, 1 << 20)
    assert found == 2 * (1 << 20) / 2e-3  # what came first, from an idle card, is not counted


def test_bandwidth_is_measured() -> None:
    assert bandwidth(CPU, 1 << 20) > 0
