"""Which machine a figure was measured on, in words without names of hosts or paths.

What it is: the line that stands beside every result. What it is not: a fingerprint.
"""

import os
import platform
from pathlib import Path

import torch


def describe_machine() -> dict[str, str | int]:
    """Processor, cores, memory, capabilities torch found, and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "memory_gib": memory_gib(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """The processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> int:
    """Physical memory, rounded to GiB; 0 where it cannot be told."""
    if not hasattr(os, "sysconf"):
        return 0
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
