"""Frozen weights of a model in fp8 (:mod:`moescale.kernels.block_fp8`): those of linear layers and routed experts.

Router, norms, biases, embedding and output stay in the model's dtype. A weight's codes have its name. Its scales are
one more parameter of the module, whose name ends with ``_scale``. Both are laid out over ranks as any parameter is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from moescale.boxes import Box, overlap, relative_to
from moescale.formats import FP8_BLOCK
from moescale.kernels.block_fp8 import CODE_DTYPE, plain, quantize, scales_shape
from moescale.models.blocks.linear import Linear
from moescale.models.blocks.moe import RoutedExperts

SCALE = "_scale"
"""What the names of parameters of scales end with, and no others."""


def keep_in_fp8(modules: Iterable[nn.Module]) -> None:
    """Replace the weights of the linear layers and routed experts among ``modules``, not yet filled, by frozen ones."""
    for module in modules:
        if isinstance(module, Linear | RoutedExperts):
            for name in ("weight",) if isinstance(module, Linear) else ("gate_up", "down"):
                weight = getattr(module, name)
                for key, shape, dtype in (
                    (name, weight.shape, CODE_DTYPE),
                    (name + SCALE, scales_shape(weight.shape), torch.float32),
                ):
                    empty = torch.empty(shape, dtype=dtype, device=weight.device)
                    setattr(module, key, nn.Parameter(empty, requires_grad=False))


def is_scale(name: str) -> bool:
    """Whether the parameter of that name holds scales."""
    return name.endswith(SCALE)


def weights_in_fp8(model: nn.Module) -> dict[str, str]:
    """Names of the weights in fp8, and of their scales."""
    return {name.removesuffix(SCALE): name for name, _ in model.named_parameters() if is_scale(name)}


def box_to_quantize(codes: Box, scales: Box, shape: tuple[int, ...]) -> Box | None:
    """What must be read of a weight of ``shape`` for these boxes of its codes and scales: whole blocks.

    None where both are empty.
    """
    of_scales = (*scales[:-2], *(slice(b.start * FP8_BLOCK, b.stop * FP8_BLOCK) for b in scales[-2:]))
    parts = [box for box in (codes, of_scales) if all(bounds.start < bounds.stop for bounds in box)]
    if not parts:
        return None
    box = []
    for dim, (bounds, size) in enumerate(zip(zip(*parts, strict=True), shape, strict=True)):
        unit = FP8_BLOCK if dim >= len(shape) - 2 else 1
        start, stop = min(b.start for b in bounds), max(b.stop for b in bounds)
        box.append(slice(start // unit * unit, min(-(-stop // unit) * unit, size)))
    return tuple(box)


@torch.no_grad()
def quantize_into(
    codes: torch.Tensor,
    codes_box: Box,
    scales: torch.Tensor,
    scales_box: Box,
    shape: tuple[int, ...],
    read: Callable[[Box], torch.Tensor],
) -> torch.Tensor:
    """Quantise a weight of ``shape`` and fill ``codes`` and ``scales``, the boxes that these are of theirs.

    ``read`` returns a box of the weight, in the dtype that it is computed with and on any device; of stacked experts it
    is asked for one at a time. Returns [2] fp64: the squares of what ``codes`` are off by, and of their weights, each
    summed up.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=codes.device)
    box = box_to_quantize(codes_box, scales_box, shape)
    if box is None:
        return sums
    experts = range(box[0].start, box[0].stop) if len(shape) == 3 else (None,)
    for expert in experts:
        part = box if expert is None else (slice(expert, expert + 1), *box[1:])
        weight = read(part).to(codes.device)
        found = quantize(weight)
        of_codes = overlap(part, codes_box)
        if of_codes is not None:
            inside = relative_to(of_codes, part)
            codes[relative_to(of_codes, codes_box)].copy_(found.codes[inside])
            wanted = weight[inside].double()
            difference = plain(found, torch.float32)[inside].double() - wanted
            sums += torch.stack([difference.square().sum(), wanted.square().sum()])
        blocks = (*part[:-2], *(slice(b.start // FP8_BLOCK, -(-b.stop // FP8_BLOCK)) for b in part[-2:]))
        of_scales = overlap(blocks, scales_box)
        if of_scales is not None:
            scales[relative_to(of_scales, scales_box)].copy_(found.scales[relative_to(of_scales, blocks)])
    return sums
