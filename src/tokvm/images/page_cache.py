"""What the kernel has of a file already: mincore(2) on a mapping that is never touched, so nothing of it becomes resident."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

import numpy as np

_PAGE = mmap.PAGESIZE


@cache
def _mincore() -> ctypes._NamedFuncPointer:
    call = ctypes.CDLL(None, use_errno=True).mincore
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return call


def is_cached(fd: int, offset: int, length: int) -> bool:
    """True when every page of the range is in the page cache; True also where the kernel will not say (mincore answers
    only to who could write the file)."""
    start = offset // _PAGE * _PAGE
    span = offset + length - start
    try:
        mapping = mmap.mmap(fd, span, prot=mmap.PROT_READ, offset=start)
    except (OSError, ValueError):
        return True
    pages = np.zeros(-(-span // _PAGE), np.uint8)
    view = np.frombuffer(mapping, np.uint8)
    failed = _mincore()(view.ctypes.data, span, pages.ctypes.data)
    del view
    mapping.close()
    return bool(failed) or bool((pages & 1).all())
