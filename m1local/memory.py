"""Does it fit, and how fast can it be? Answered before anything is read.

What it is: the bytes that weights, keys and values, and the work in between will take, from the
config and the formats alone; free memory and bandwidth, asked of the machine; and the first setting
that fits. What it is not: a promise of speed: tokens/s are what the bandwidth allows at most.
Source of the formulas: what model.py and cache.py allocate; checked by tests/test_memory.py.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import psutil
import torch

from m1local.cache import DEFAULT_MAX_CHUNK, REWIND_TOKENS, KVCache, LayerCache
from m1local.checkpoint import EMBEDDING, HEAD, expected_tensors, parameter_shapes
from m1local.config import HeadLayout, M1Config
from m1local.cuda import support
from m1local.cuda.card import is_served
from m1local.cuda.transfer import aligned
from m1local.formats import LinearSpec, format_class
from m1local.formats.base import Stored
from m1local.kv_store import FLOAT, KV_BYTES
from m1local.native.stream import read_through
from m1local.workspace import Workspace

CONTEXT_BYTES = 300 << 20  # of a smaller card's context: presumed
LIBRARY_BYTES = 150 << 20  # of cuBLAS and kernels, which come after it; both are 757 on an H200
PROCESS_BYTES = 350 << 20  # of Python and torch besides (bench/results/memory.json)
GRAPH_BYTES = 64 << 10  # of each launch that a captured graph holds: presumed
LAUNCHES_PER_LAYER = 10  # at most; 6 where kernels read every matrix
ALLOCATED_PIECE, LEAST_OF_ITS_OWN = 2 << 20, 10 << 20  # of torch's allocator on a card
MEASURED_BYTES = 512 << 20
LEAST_MEASURED_BYTES = 64 << 20  # less would stay in the caches of some cards
TRIES = 5
WARMING_SECONDS = 0.3
CARD_CHUNK = 1024  # tokens: a card restores its matrices for each chunk, the fewer the better
LAYERS = "model.layers."


def free_bytes(device: torch.device) -> int:
    """Bytes that may be allocated on `device` without pushing anything out."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what a model left that is no more
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)


def room(device: torch.device, free: int | None = None, *, untouched: bool = False) -> int:
    """Bytes of `device` that a plan may fill: what is free but for what libraries take later.

    `free` is what is free now if not said; asking has made a card's context, which is then not
    among it. Of a card that is `untouched` there is none yet.
    """
    left = free_bytes(device) if free is None else free
    if device.type != "cuda":
        return left
    return left - LIBRARY_BYTES - (CONTEXT_BYTES if untouched else 0)


def used_device() -> torch.device:
    """The first card, or the CPU where there is none that this torch has code for."""
    first = torch.device("cuda", 0)
    return first if torch.cuda.is_available() and is_served(first) else torch.device("cpu")


def bandwidth(device: torch.device, nbytes: int = MEASURED_BYTES) -> float:
    """Bytes per second that `device` reads, the median of a few tries.

    On a card a copy tells, which reads and writes; on the CPU the compiled library reads only.
    Where a card is nearly full, less than `nbytes` is copied.
    """
    if device.type == "cuda":
        return _copy_bandwidth(device, copied_bytes(nbytes, free_bytes(device)))
    source = torch.zeros(nbytes // 8, dtype=torch.int64, device=device)
    rates = []
    for _ in range(TRIES + 1):  # the first touches what was never touched
        begun = time.perf_counter()
        if not read_through(source):
            source.sum()
        rates.append(nbytes / (time.perf_counter() - begun))
    return statistics.median(rates[1:])


def _copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """The same of a card by its own clock, after a while: an idle one's memory runs slowly."""
    source = torch.empty(nbytes // 8, dtype=torch.int64, device=device).random_()
    target = torch.empty_like(source)

    def copied() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        return float(2000 * nbytes / begin.elapsed_time(end))

    begun = time.perf_counter()
    while time.perf_counter() - begun < WARMING_SECONDS:
        copied()
    return statistics.median([copied() for _ in range(TRIES)])


def copied_bytes(wanted: int, free: int) -> int:
    """How much is copied where `free` bytes are free: twice that is taken, with room to spare."""
    return max(LEAST_MEASURED_BYTES, min(wanted, free // 3))


@dataclass(frozen=True, slots=True)
class Setting:
    """How a model is to be run; `gpu_layers` None puts all layers on the card."""

    context_tokens: int
    kv_type: str = FLOAT
    gpu_layers: int | None = None
    max_chunk: int = DEFAULT_MAX_CHUNK
    rewind_tokens: int = REWIND_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Bytes on the device, by what they are for; `host` is what stays in the computer's memory.

    `read` is what one token reads of the device, `host_read` of the host, with a full context.
    """

    weights: int
    cache: int
    workspace: int
    graphs: int
    gaps: int  # what a card's allocator leaves unused behind what it gives
    runtime: int
    host: int
    read: int
    host_read: int

    @property
    def device(self) -> int:
        """All that is allocated on the device, without what the system takes for the process."""
        return self.weights + self.cache + self.workspace + self.graphs + self.gaps

    def tokens_per_second(self, device_bandwidth: float, host_bandwidth: float) -> float:
        """What the bandwidths, in bytes per second, allow at most."""
        return 1 / (self.read / device_bandwidth + self.host_read / host_bandwidth)


class Model:
    """What must be known of a model: its config and how each of its matrices is stored."""

    def __init__(
        self,
        config: M1Config,
        specs: Mapping[str, LinearSpec],
        dtype: torch.dtype,
        host_dtype: torch.dtype | None = None,
    ) -> None:
        """`specs` by module, as a manifest has them; what is not in it is kept in `dtype`.

        Layers that leave a card for the CPU compute in `host_dtype`, the same if not said.
        """
        self.config = config
        self.dtype = dtype
        self.host_dtype = host_dtype or dtype
        shapes = parameter_shapes(config) if specs else {}
        matrices = {(shapes[f"{name}.weight"], spec.format) for name, spec in specs.items()}
        self.restored = max(
            (
                format_class(known).restored_bytes((shape[0], shape[1]), dtype)
                for shape, known in matrices
            ),
            default=0,
        )
        tensors = expected_tensors(config, specs)
        self._sizes = _sizes(tensors, dtype)
        self.parts = {part: sum(sizes) for part, sizes in self._sizes.items()}
        on_host = _sizes(tensors, self.host_dtype)
        self._host_parts = {part: sum(sizes) for part, sizes in on_host.items()}

    @property
    def weights(self) -> int:
        """Bytes of all of them where all are on the device."""
        return sum(self.parts.values())

    def layer_bytes(self, layer: int) -> int:
        """Bytes of one layer's weights."""
        return self.parts[f"{LAYERS}{layer}"]

    def demand(self, setting: Setting, device: torch.device) -> Demand:
        """What `setting` takes; on the CPU everything is the host's and the device's alike.

        The last layers are those on the card, with the head; the first ones stay on the host, and
        the embedding always does. Without any layer there, nothing is.
        """
        layers = self.config.num_hidden_layers
        on_card = layers if setting.gpu_layers is None else min(setting.gpu_layers, layers)
        first = layers - on_card
        seen = [
            read_bytes(
                self.config.heads(layer), setting.kv_type,
                self.host_dtype if layer < first else self.dtype, setting.context_tokens,
            )
            for layer in range(layers)
        ]  # fmt: skip
        host = self._host_parts
        host_layers = sum(host[f"{LAYERS}{layer}"] for layer in range(first))
        host_kept = layer_caches(self.config, setting, self.host_dtype)[:first]
        host_cache = sum(layer.nbytes for layer in host_kept)
        if on_card == 0:
            weights = sum(host.values())
            return Demand(
                weights=0, cache=0, workspace=0, graphs=0, gaps=0, runtime=0, read=0,
                host=weights + host_cache, host_read=weights - host[EMBEDDING] + sum(seen),
            )  # fmt: skip
        kept = layer_caches(self.config, setting, self.dtype)
        embedding = self.parts[EMBEDDING]
        away = embedding if device.type == "cuda" else 0
        weights = self.weights - away - sum(self.layer_bytes(layer) for layer in range(first))
        return Demand(
            weights=weights,
            cache=sum(layer.nbytes for layer in kept[first:]),
            workspace=self.workspace(setting, kept, device).nbytes,
            graphs=on_card * LAUNCHES_PER_LAYER * GRAPH_BYTES if device.type == "cuda" else 0,
            gaps=self._gaps(setting, kept[first:], device),
            runtime=CONTEXT_BYTES + LIBRARY_BYTES if device.type == "cuda" else PROCESS_BYTES,
            host=host_layers + host_cache + (self._host_embedding(first, device) if away else 0),
            read=weights - (embedding - away) + sum(seen[first:]),
            host_read=host_layers + sum(seen[:first]),
        )

    def allocated(self, setting: Setting) -> int:
        """Bytes of the one allocation for all weights that `setting` puts on a card."""
        return sum(aligned(size) for size in self._on_card(setting))

    def _on_card(self, setting: Setting) -> Iterator[int]:
        """The bytes of each tensor that `setting` puts on a card."""
        layers = self.config.num_hidden_layers
        first = 0 if setting.gpu_layers is None else max(0, layers - setting.gpu_layers)
        elsewhere = {EMBEDDING, *(f"{LAYERS}{layer}" for layer in range(first))}
        for part, sizes in self._sizes.items():
            yield from () if part in elsewhere else sizes

    def workspace(
        self, setting: Setting, caches: Sequence[LayerCache], device: torch.device
    ) -> Workspace:
        """What reading a prompt takes; `caches` are those of the layers."""
        return Workspace(
            self.config, caches, min(setting.max_chunk, setting.context_tokens), self.dtype, device,
            kernels=device.type == "cuda" and by_kernels(device), restored=self.restored,
        )  # fmt: skip

    def _host_embedding(self, first: int, card: torch.device) -> int:
        """Bytes of the embedding beside a `card` with the layers from `first` on.

        It has its layer's type, and is pinned only for kernels that read it (host_embedding.py).
        """
        if first:
            return self._host_parts[EMBEDDING]
        return (
            sum(map(pinned, self._sizes[EMBEDDING])) if by_kernels(card) else self.parts[EMBEDDING]
        )

    def _gaps(self, setting: Setting, buffers: Sequence[LayerCache], device: torch.device) -> int:
        """What lies unused between and behind what `setting` puts on a card."""
        if device.type != "cuda":
            return 0
        kept = (each for one in buffers for each in (*one.k.tensors, *one.v.tensors))
        behind = sum(gap(each.nbytes) for each in kept)
        if not by_kernels(device):  # each tensor is allocated by itself
            return behind + sum(gap(size) for size in self._on_card(setting))
        together = self.allocated(setting)
        return behind + together - sum(self._on_card(setting)) + gap(together)


def pinned(nbytes: int) -> int:
    """What torch takes for so many bytes of pinned memory: a power of two of them.

    (c10's CachingHostAllocator.h; it keeps what is given back for the next of that size.)
    """
    return 1 << (nbytes - 1).bit_length()


def gap(nbytes: int) -> int:
    """What torch's allocator leaves behind an allocation of so many bytes on a card.

    From 10 MiB on it asks the driver for whole pieces of 2 MiB, and hardly anything fits behind
    what is used of the last; smaller ones share pieces. (c10/cuda/CUDACachingAllocator.cpp)
    """
    return -nbytes % ALLOCATED_PIECE if nbytes >= LEAST_OF_ITS_OWN else 0


def _sizes(
    tensors: Mapping[str, Stored | tuple[int, ...]], dtype: torch.dtype
) -> dict[str, list[int]]:
    """The bytes of each tensor, by part; what is not quantized takes `dtype`."""
    sizes: dict[str, list[int]] = {}
    for name, stored in tensors.items():
        found = stored if isinstance(stored, Stored) else Stored(stored, dtype)
        sizes.setdefault(_part(name), []).append(found.nbytes)
    return sizes


def _part(tensor_name: str) -> str:
    """Embedding, head, one of the layers, or the rest."""
    if tensor_name.startswith(LAYERS):
        return LAYERS + tensor_name.removeprefix(LAYERS).partition(".")[0]
    return next((part for part in (EMBEDDING, HEAD) if tensor_name.startswith(part)), "norm")


def cache_bytes(config: M1Config, tokens: int, kv_type: str = FLOAT) -> int:
    """Bytes of keys and values that `tokens` tokens need at least, raw state included."""
    total = 0
    for layer in range(config.num_hidden_layers):
        layout = config.heads(layer)
        token = 2 * layout.num_kv_heads * layout.head_dim
        kept = min(tokens, layout.window or tokens)
        total += int(token * (kept * KV_BYTES[kv_type] + KV_BYTES[FLOAT]))
    return total


def layer_caches(config: M1Config, setting: Setting, dtype: torch.dtype) -> Sequence[LayerCache]:
    """Each layer's cache as it is allocated, but without memory."""
    cache = KVCache.allocate(
        config,
        setting.context_tokens,
        dtype=dtype,
        device="meta",
        max_chunk=setting.max_chunk,
        rewind_tokens=setting.rewind_tokens,
        kv_type=setting.kv_type,
    )
    return cache.layers


def read_bytes(layout: HeadLayout, kv_type: str, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of keys and values that one layer reads for a token behind so many.

    As they are kept, they are of the type `dtype` in which the layer computes.
    """
    value = dtype.itemsize if kv_type == FLOAT else KV_BYTES[kv_type]
    seen = min(tokens, layout.window or tokens)
    return int(2 * layout.num_kv_heads * layout.head_dim * value * seen)


def options(wanted: Setting, layers: int) -> Iterator[Setting]:
    """Settings in the order in which they cost the user: nothing, then speed, little by little."""
    yield wanted
    if wanted.max_chunk > DEFAULT_MAX_CHUNK:
        wanted = in_smaller_chunks(wanted)
        yield wanted
    for on_card in range(layers - 1, 0, -1):
        yield replace(wanted, gpu_layers=on_card)


def suited(wanted: Setting, device: torch.device) -> Setting:
    """`wanted` as it is on `device`: kernels of a card read prompts in larger chunks."""
    larger = device.type == "cuda" and by_kernels(device)
    return replace(wanted, max_chunk=CARD_CHUNK) if larger else wanted


def by_kernels(card: torch.device) -> bool:
    """Whether Triton's kernels compute on `card`; presumed of one that is not there."""
    return not torch.cuda.is_available() or support.usable(card)


def in_smaller_chunks(wanted: Setting) -> Setting:
    """`wanted` with prompts in chunks of the usual size, which take less work space."""
    return replace(wanted, max_chunk=min(wanted.max_chunk, DEFAULT_MAX_CHUNK))


def settle(model: Model, wanted: Setting, device: torch.device, free: int) -> Setting:
    """The first of `options` that fits into `free` bytes of `device`; else no layer there."""
    for setting in options(wanted, model.config.num_hidden_layers):
        if model.demand(setting, device).device <= free:
            return setting
    return replace(in_smaller_chunks(wanted), gpu_layers=0)
