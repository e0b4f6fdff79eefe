"""What NVIDIA's driver says of its cards, whatever torch can do with them.

What it is: one question to the driver's own library, which lies beside the system's, so that it can
be said that a card is there where torch finds none. What it is not: a way to compute on one.
Source: CUDA driver API, cuInit, cuDeviceGetCount, cuDeviceGet, cuDeviceGetName.
"""

import ctypes
import sys

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MOST_NAME = 256  # bytes
NO_CARD = (34, 100, 101)  # a stub instead of a driver; no device, or none that may be seen


def first_card(library: str = LIBRARY) -> str:
    """The name of the first card; empty where there is no driver, no card, or it was hidden.

    Of a driver that does not begin its work, it is the error's number.
    """
    try:
        driver = ctypes.CDLL(library)
        count, device = ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(MOST_NAME)
        if error := driver.cuInit(0):
            return "" if error in NO_CARD else f"NVIDIA's card (driver error {error})"
        if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
            return ""
        if driver.cuDeviceGet(ctypes.byref(device), 0):
            return ""
        if driver.cuDeviceGetName(name, MOST_NAME, device):
            return ""
    except (OSError, AttributeError):  # no such library, or another of its name
        return ""
    return name.value.decode(errors="replace")
