"""SHA-256 of several streams at once, in the compiled library.

What it is: for hashing whole checkpoints on a processor with instructions for it, twice as fast as
one stream after the other: each waits for its own last round most of the time. What it is not: a
replacement of hashlib, the oracle in the tests, which serves one stream, and where there is no such
library. Source: FIPS 180-4.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

from m1local.native.library import library

STREAMS = 3  # at once; a fourth gains nothing
BLOCK_BYTES = 64
INITIAL = (
    *(0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A),
    *(0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19),
)
_State = ctypes.c_uint32 * len(INITIAL)


class Sha256:
    """One hash in progress."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self.state = _State(*INITIAL)
        self._nbytes = 0

    def finish(self, rest: bytes) -> str:
        """The hash in hexadecimal, with the last bytes, fewer than a block; to be called once."""
        length = (8 * (self._nbytes + len(rest))).to_bytes(8, "big")
        padding = b"\x80" + bytes(-(len(rest) + 1 + len(length)) % BLOCK_BYTES)
        last = rest + padding + length
        buffer = (ctypes.c_ubyte * len(last)).from_buffer_copy(last)
        add_blocks([self], [ctypes.addressof(buffer)], len(last))
        return b"".join(word.to_bytes(4, "big") for word in self.state).hex()

    def grown(self, nbytes: int) -> None:
        """Note that so many bytes were added."""
        self._nbytes += nbytes


def add_blocks(hashes: Sequence[Sha256], addresses: Sequence[int], nbytes: int) -> bool:
    """Add to each of up to STREAMS hashes `nbytes`, whole blocks, that begin at its address.

    Python's lock is let go meanwhile. False where the library, or the processor, cannot.
    """
    compiled, count = library(), len(hashes)
    if compiled is None:
        return False
    states = (ctypes.c_void_p * count)(*(ctypes.addressof(hash_.state) for hash_ in hashes))
    blocks = (ctypes.c_void_p * count)(*addresses)
    whole = ctypes.c_int64(nbytes // BLOCK_BYTES)
    done = bool(compiled.m1_sha256(states, blocks, whole, count))
    for each in hashes:
        each.grown(nbytes)
    return done


@cache
def usable() -> bool:
    """Whether `add_blocks` works here."""
    return add_blocks([Sha256()], [0], 0)
