"""What the package asks of libraries through the environment, before they are imported."""

from __future__ import annotations

import os


def prefer_expandable_segments() -> None:
    """Have torch's CUDA allocator grow its segments, unless the user has configured it.

    Without, the parts of 16 B parameters leave holes of gigabytes. Torch reads the variable when it is imported, and
    processes that this one starts inherit it.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
