"""Gives memory back to the system that the process holds and does not need."""

from __future__ import annotations

import ctypes
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")
MADV_PAGEOUT = 21  # Linux 5.4: take pages out of memory, keeping what is on them
RELEASE_BYTES = 1 << 26  # so much may wait: each release walks through the whole file
LEAST_BYTES = 1 << 16  # looking up where smaller tensors lie takes longer than they are worth

_Mapping = tuple[int, int]  # first address and the one behind the last
_read: dict[_Mapping, int] = {}  # bytes read of mapped files since their pages were released
_libc = ctypes.CDLL(None)


def release_file_pages(tensor: Tensor) -> None:
    """Note that a tensor was read for the last time for long; from time to time, take its file out of memory.

    `from_pretrained` maps checkpoints, so codes lie in pages of the file. Kernels read the packed copy
    instead, and the pages would count as memory of the process: of a large model, as much as its weights.
    Reading brings them back, and nothing is lost, what was written neither. It is advice: other systems keep
    the pages, and Linux those that another process reads or of a file that the user may not write.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < LEAST_BYTES or not MAPS.exists():
        return
    mapping = _file_around(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
    if mapping is None:
        return
    _read[mapping] = _read.get(mapping, 0) + tensor.nbytes
    if _read[mapping] >= RELEASE_BYTES:
        first, last = mapping
        # The whole mapping: Linux keeps files in pieces of up to 2 MiB, and takes out none in part.
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_PAGEOUT)
        del _read[mapping]


def trim_heap() -> None:
    """Return freed memory, of which the C library keeps what lies below something in use; glibc alone can."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def _file_around(begin: int, end: int) -> _Mapping | None:
    """The mapping of a file that holds these addresses; None for other memory."""
    for line in MAPS.read_text().splitlines():
        words = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in words[0].split("-"))
        if first <= begin and end <= last:
            return (first, last) if len(words) == 6 and words[5].startswith("/") else None
    return None
