"""A digest of the weights that a run does not train: checkpoints leave them out, and name by it what they belong to."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch

from moescale.boxes import whole_box
from moescale.convert.tensor_source import TensorSource
from moescale.kernels.block_fp8 import CODE_DTYPE, quantize, scales_shape
from moescale.models.transformer import Transformer
from moescale.runtime.layout import Part, local_tensor
from moescale.runtime.ranks import Ranks

_PIECE_ELEMENTS = 2**22
_MODULUS = 2**64
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, CODE_DTYPE: torch.int8}


@torch.no_grad()
def frozen_digest(model: Transformer, parts: Mapping[str, Part], ranks: Ranks) -> str:
    """Return 16 hexadecimal digits of every bit of the frozen parameters and buffers, in any layout. A collective.

    A sum modulo 2^64 of each element's bits times an odd number made of its index and its parameter's name: so parts
    can be added up in any order. It tells other weights apart, but not an adversary's.
    """
    total = 0
    for name, parameter in model.named_parameters():
        part = parts[name].own
        if not parameter.requires_grad and part.is_first_copy:
            total += _sum_of(name, parts[name].own_rows(local_tensor(parameter)), part)
    if ranks.is_first:
        for name, buffer in model.named_buffers():
            bits = buffer.detach().view(_BITS[buffer.dtype]).flatten().tolist()
            total += _factor(name) * sum((2 * index + 1) * value for index, value in enumerate(bits))
    return f"{sum(ranks.gather(total % _MODULUS)) % _MODULUS:016x}"


def source_digest(source: TensorSource, in_fp8: Mapping[str, str]) -> str:
    """The same digest of weights that are read one parameter, or one expert's slice of it, at a time.

    ``in_fp8``: which of them the model keeps in fp8, and the names of their scales.
    """
    total = 0
    for name in source.names():
        shape = source.shape(name)
        for index in range(shape[0]) if len(shape) == 3 else (None,):
            tensor = source.read(name, index)
            parts = [(name, tensor, shape)]
            if name in in_fp8:
                codes, scales = quantize(tensor)
                parts = [(name, codes, shape), (in_fp8[name], scales, scales_shape(shape))]
            for key, part, whole in parts:
                box = whole_box(whole)
                if index is not None:
                    box, part = (slice(index, index + 1), *box[1:]), part.unsqueeze(0)
                total += _sum_of(key, part, Part(shape=whole, index=box))
    return f"{total % _MODULUS:016x}"


def _factor(name: str) -> int:
    return 2 * zlib.crc32(name.encode()) + 1


def _sum_of(name: str, tensor: torch.Tensor, part: Part) -> int:
    """The sum of one part; int64 arithmetic wraps, which is what modulo 2^64 asks for."""
    if tensor.numel() == 0:
        return 0
    bits = tensor.contiguous().view(_BITS[tensor.dtype]).view(-1, tensor.shape[-1])
    strides = torch.tensor([1], dtype=torch.int64)
    for size in reversed(part.shape[1:]):
        strides = torch.cat([strides[:1] * size, strides])
    starts = torch.zeros(1, dtype=torch.int64)
    for box, stride in zip(part.index[:-1], strides[:-1], strict=True):
        places = torch.arange(box.start, box.stop, dtype=torch.int64) * stride
        starts = (starts.unsqueeze(1) + places).flatten()
    starts = starts.to(tensor.device).unsqueeze(1)  # of each row in the whole parameter
    columns = torch.arange(part.index[-1].start, part.index[-1].stop, dtype=torch.int64, device=tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    rows = max(1, _PIECE_ELEMENTS // tensor.shape[-1])
    for first in range(0, bits.shape[0], rows):
        piece = slice(first, first + rows)
        total += (bits[piece].long() * (2 * (starts[piece] + columns) + 1)).sum()
    return _factor(name) * int(total)
