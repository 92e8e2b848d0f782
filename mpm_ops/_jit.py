"""Compiling loops for the CPU, without the interpreter's lock."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numba

logger = logging.getLogger(__name__)


def jit(function: Callable[..., Any] | None = None, *, fastmath: frozenset[str] = frozenset()) -> Callable[..., Any]:
    """Compile at the first call and keep the machine code for other processes.

    It is kept in NUMBA_CACHE_DIR, beside the source, or in the user's cache folder, whichever can be written.
    fastmath names the liberties LLVM may take with floating-point arithmetic, so that reductions vectorise.
    """
    if function is None:
        return partial(jit, fastmath=fastmath)
    options = {"nogil": True, "fastmath": set(fastmath)}
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba refuses rather than doing without
        logger.info("%s will be compiled in every process; set NUMBA_CACHE_DIR to a writable folder", function)
        compiled = numba.njit(**options)(function)
    return compiled
