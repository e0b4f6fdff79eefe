"""Which machine a figure was measured on, in words without names of hosts or paths.

What it is: the line that stands beside every result. What it is not: a fingerprint.
"""

import os
import platform

import torch

from m1local_app.doctor import processor


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


def memory_gib() -> int:
    """Physical memory, rounded to GiB; 0 where it cannot be told."""
    if not hasattr(os, "sysconf"):
        return 0
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
