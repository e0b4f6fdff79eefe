"""What `m1 doctor` finds out about this machine.

What it is: facts with their names, in groups, and an advice beside each that is a trouble; as
aligned lines or as JSON, whose keys are never translated. What it is not: a repair, or a benchmark.
The hub is the only thing asked for over the network, and not with --offline.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from m1local import __version__, home
from m1local.errors import M1Error
from m1local.formats import FORMATS, format_class
from m1local.memory import free_bytes, used_device
from m1local.native import library
from m1local.placement import decoding
from m1local_app.columns import padded, width
from m1local_app.idle_card import idle_card
from m1local_app.kept import checkpoints, size_text
from m1local_app.language import language, marked, tr

PACKAGES = (
    "torch", "bitsandbytes", "gradio", "huggingface-hub", "safetensors", "sentencepiece", "typer",
    "optimum", "llguidance",
)  # fmt: skip
EXTRAS = {"optimum": "optimum", "llguidance": "json"}
HUB_SECONDS = 5
# Names that are words; those of packages, devices and formats are the same in every language.
LABELS = (
    marked("versions"), marked("system"), marked("language"),
    marked("device"), marked("processor"), marked("cores"), marked("instructions"),
    marked("card"), marked("used"),
    marked("kernels"), marked("memory"), marked("total"), marked("free"),
    marked("storage"), marked("writable"), marked("models"),
    marked("hub"), marked("address"), marked("reachable"),
)  # fmt: skip
MODEL_BYTES = 9 << 30  # of the 14B at 4 bits, with a context of 8192


@dataclass(frozen=True, slots=True)
class Fact:
    """One line: `value` of `name` in `group`, and what to do about it, if anything."""

    group: str
    name: str
    value: str
    advice: str = ""


def examine(*, offline: bool) -> list[Fact]:
    """Everything, in the order it is shown."""
    kernels = _kernels(FORMATS)
    return [*_versions(), *_device(), *kernels, *_memory(), *_storage(), *_hub(offline)]


def of_machine(formats: Collection[str]) -> list[Fact]:
    """Devices, the kernels of `formats`, and memory: what a loaded model runs on."""
    return [*_device(), *_kernels(formats), *_memory()]


def as_text(facts: list[Fact]) -> str:
    """Aligned lines, each group under its name, advice under its line."""
    lines: list[str] = []
    most, group = max(width(label(fact.name)) for fact in facts), ""
    for fact in facts:
        if fact.group != group:
            group = fact.group
            lines += ["", label(group)] if lines else [label(group)]
        lines.append(f"  {padded(label(fact.name), most)}  {fact.value}")
        lines += [f"  {padded('', most)}  -> {fact.advice}"] if fact.advice else []
    return "\n".join(lines)


def label(name: str) -> str:
    """What a fact or a group is called in the chosen language."""
    return tr(name) if name in LABELS else name


def as_json(facts: list[Fact]) -> str:
    """The same as an object of objects, and the list of advice."""
    groups: dict[str, object] = {}
    for fact in facts:
        group = groups.setdefault(fact.group, {})
        assert isinstance(group, dict)
        group[fact.name] = fact.value
    groups["advice"] = [fact.advice for fact in facts if fact.advice]
    return json.dumps(groups, indent=1, ensure_ascii=False)


def _versions() -> Iterator[Fact]:
    yield Fact("versions", "m1local", __version__)
    yield Fact("versions", "python", platform.python_version())
    yield Fact("versions", "system", f"{platform.system()} {platform.release()}")
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
            # torch's own names its build, as +cpu or +cu128; that of its files need not.
            yield Fact("versions", name, torch.__version__ if name == "torch" else version)
        except importlib.metadata.PackageNotFoundError:
            if name in EXTRAS:
                yield Fact("versions", name, tr("not installed; extra [{name}]", name=EXTRAS[name]))
            else:
                advice = tr("install it: pip install {name}", name=name)
                yield Fact("versions", name, tr("missing"), advice)
    yield Fact("versions", "language", language())


def _device() -> Iterator[Fact]:
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    threads = torch.get_num_threads()
    yield Fact("device", "processor", processor())
    yield Fact("device", "cores", tr("{cores}, {threads} threads", cores=cores, threads=threads))
    yield Fact("device", "instructions", torch.backends.cpu.get_cpu_capability())
    idle, used = idle_card(), str(used_device())
    if torch.cuda.is_available():  # NVML counts cards that torch cannot use as well
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            said = f"{card.name}, {size_text(card.total_memory)}, {card.major}.{card.minor}"
            yield Fact("device", f"cuda:{index}", said)
        yield Fact("device", "used", used, f"{idle.reason}: {idle.advice}" if idle else "")
        return
    if idle is not None:
        yield Fact("device", "card", idle.name)
        yield Fact("device", "cuda", idle.reason, idle.advice)
    else:
        built = torch.version.cuda
        found = tr("torch finds no card") if built else tr("torch was built without CUDA")
        yield Fact("device", "cuda", found)
    yield Fact("device", "used", used)


def _kernels(formats: Collection[str]) -> Iterator[Fact]:
    compiled = library.status()
    advice = "" if compiled.active else tr("quantizing and answering are slower without it")
    yield Fact("kernels", "C library", compiled.text, advice)
    device = used_device()
    for name in (known for known in FORMATS if known in formats):
        try:
            yield Fact("kernels", name, format_class(name).kernel(device))
        except (M1Error, ImportError, OSError) as error:  # a broken install must not end the tour
            yield Fact("kernels", name, tr("none: {reason}", reason=error))
    if device.type == "cuda":
        yield Fact("kernels", "decode", decoding(device))


def _memory() -> Iterator[Fact]:
    free = free_bytes(torch.device("cpu"))
    advice = ""
    if free < MODEL_BYTES:
        advice = tr("the 14B in 4 bits wants {size}", size=size_text(MODEL_BYTES))
    yield Fact("memory", "total", size_text(psutil.virtual_memory().total))
    yield Fact("memory", "free", size_text(free), advice)


def _storage() -> Iterator[Fact]:
    place = home.home()
    yield Fact("storage", "M1_HOME", str(place))
    existing = next(path for path in (place, *place.absolute().parents) if path.exists())
    yield Fact("storage", "free", size_text(shutil.disk_usage(existing).free))
    if not os.access(existing, os.W_OK):
        yield Fact("storage", "writable", tr("no"), tr("set M1_HOME to a folder of your own"))
    yield Fact("storage", "models", str(len(checkpoints())))


def _hub(offline: bool) -> Iterator[Fact]:
    from huggingface_hub import constants

    address = constants.ENDPOINT
    yield Fact("hub", "address", address)
    if offline:
        yield Fact("hub", "reachable", tr("not asked (--offline)"))
        return
    request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "m1local"})
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            yield Fact("hub", "reachable", tr("yes"))
    except urllib.error.HTTPError as error:  # it answered
        yield Fact("hub", "reachable", tr("yes, with status {code}", code=error.code))
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        advice = tr("fetching needs it; a mirror: HF_ENDPOINT. Chatting does not")
        yield Fact("hub", "reachable", tr("no: {reason}", reason=reason), advice)


def processor() -> str:
    """The processor's name as the system gives it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
