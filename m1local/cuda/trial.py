"""The smallest kernel, which tells whether any can be built and launched.

What it is: one number stored. Triton builds a launcher with the system's C compiler and Python's
headers, which many a desktop lacks; that shows only when something is launched. What it is not:
imported where Triton is missing (support.py asks for it).
"""

import torch
import triton
import triton.language as tl


@triton.jit
def one_kernel(out):
    """`out` becomes 1."""
    tl.store(out, 1.0)


def launch(device: torch.device) -> None:
    """Launch it on `device` and wait; raises whatever is raised, or RuntimeError if it does not."""
    out = torch.zeros(1, device=device)
    one_kernel[(1,)](out, num_warps=1)
    if float(out) != 1:
        raise RuntimeError("a kernel stored nothing")
