"""How much memory there is.

What it is: the free memory of a device, asked of the system now. What it is not: a plan of what to
put where.
"""

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that may be allocated on `device` without pushing anything out."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)


def used_device() -> torch.device:
    """The first card, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
