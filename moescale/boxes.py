"""Boxes in tensors: which elements a rank, a file or a stored tensor holds of a whole. Imports no torch.

A box is one slice with explicit bounds per dim, so it indexes a tensor as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[slice, ...]


def whole_box(shape: Sequence[int]) -> Box:
    """Return the box that holds every element of a tensor of ``shape``."""
    return tuple(slice(0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """Return the shape of a tensor that holds the elements of ``box``."""
    return tuple(bounds.stop - bounds.start for bounds in box)


def num_elements(box: Box) -> int:
    """Return how many elements ``box`` holds."""
    return math.prod(box_shape(box))


def overlap(first: Box, second: Box) -> Box | None:
    """Return the elements in both boxes of one tensor, or None where there are none."""
    common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first, second, strict=True))
    return common if all(bounds.start < bounds.stop for bounds in common) else None


def relative_to(box: Box, outer: Box) -> Box:
    """Return ``box``, which lies in ``outer``, counted from where ``outer`` begins: its place in outer's own tensor."""
    return tuple(
        slice(bounds.start - around.start, bounds.stop - around.start)
        for bounds, around in zip(box, outer, strict=True)
    )


def first_index(box: Box, shape: Sequence[int]) -> int:
    """Return the row-major index of the first element of ``box`` in a tensor of ``shape``."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return sum(bounds.start * stride for bounds, stride in zip(box, strides, strict=True))


def is_contiguous(box: Box, shape: Sequence[int]) -> bool:
    """Return whether ``box`` is one run of elements of a tensor of ``shape``: only the outermost dim is cut."""
    return all(bounds == slice(0, size) for bounds, size in list(zip(box, shape, strict=True))[1:])
