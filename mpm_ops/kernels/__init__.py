"""Triton-language kernels, each beside the torch function that specifies it.

The modules import triton, which not every machine has: ask `has_triton` before importing one.
"""

import importlib.util


def has_triton() -> bool:
    """Whether the kernels' language is installed; it runs on GPUs, and as an interpreter for tests."""
    return importlib.util.find_spec("triton") is not None
