"""Maps the arrays of an index into memory, quickly: a run opens many."""

from __future__ import annotations

import io
import math
import mmap
from functools import lru_cache

import numpy as np

from mmctx.errors import DataError

_OPEN_ARRAYS = 256  # numpy keeps a file descriptor for each mapped array


@lru_cache(maxsize=_OPEN_ARRAYS)
def map_array(path: str, content_hash: str) -> np.ndarray:
    """The array in a file. `content_hash` is there to tell the arrays of a rebuilt index from the old ones."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 10 + int.from_bytes(data[8:10], "little")
        dtype, shape = _parse_header(data[:start])
        return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: the index cannot be read ({error}); rebuild it with `mmctx data index --force`"
        ) from None


@lru_cache(maxsize=1024)
def _parse_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape of a .npy file of version 1. numpy takes ten times as long to open a file, most of it to parse this anew each time."""
    stream = io.BytesIO(header)
    if (version := np.lib.format.read_magic(stream)) != (1, 0):
        raise ValueError(f"expected version (1, 0) of the npy format, found {version}")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran_order:
        raise ValueError("expected rows one after the other, found columns")
    return dtype, shape
