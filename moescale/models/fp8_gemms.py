"""Which modules of a model multiply in fp8 (:mod:`moescale.kernels.fp8`), and the copies of their weights.

Routed experts, and linear layers inside the blocks. Router, norms, embedding, output and loss stay as they are. Copies
follow from the weights, so no checkpoint holds them.

What such layers read of a norm is quantised by the norm, once for all of them. A module says by ``norm_readers`` which
those are; of one that does not, each layer quantises its input itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moescale.errors import ConfigError
from moescale.formats import FP8_GEMM_MULTIPLE
from moescale.kernels.fp8 import empty_copies, objection_to_fp8, write_copies
from moescale.kernels.fp8.errors import note_copies
from moescale.kernels.fp8.scaled import Copies
from moescale.models.blocks.linear import Linear
from moescale.models.blocks.moe import RoutedExperts
from moescale.models.transformer import Block, Transformer
from moescale.plan import check_experts_in_fp8


def use_fp8(model: Transformer, *, experts: bool, dense: bool) -> None:
    """Let the routed experts and the linear layers of ``model``, in bf16 and allocated, multiply in fp8.

    Their copies are not written yet. Raises ConfigError for a model whose experts cannot, and for a GPU that cannot.
    """
    objection = objection_to_fp8(model.embedding.weight.device) if experts or dense else None
    if objection is not None:
        raise ConfigError(f"plan.{'expert' if experts else 'dense'}_gemms (fp8) {objection}")
    if experts:
        check_experts_in_fp8(model.config)
    for module in model.layers.modules():
        if isinstance(module, RoutedExperts) and experts:
            module.gate_up_copies, module.down_copies = empty_copies(module.gate_up), empty_copies(module.down)
        if isinstance(module, Linear) and dense and all(size % FP8_GEMM_MULTIPLE == 0 for size in module.weight.shape):
            module.copies = empty_copies(module.weight)
    for block in model.layers:
        assert isinstance(block, Block)
        _let_norms_quantize(block)


def _let_norms_quantize(block: Block) -> None:
    """Have each norm of ``block`` quantise its result where a layer takes it so."""
    for norm, module in ((block.attention_norm, block.attention), (block.feed_forward_norm, block.feed_forward)):
        for inner, layer in getattr(module, "norm_readers", tuple)():
            if _reads_fp8(layer):
                (norm if inner is None else inner).quantizes = True


def _reads_fp8(layer: Linear | RoutedExperts) -> bool:
    """Whether the layer takes its input in e4m3, as a norm quantises it."""
    if isinstance(layer, Linear):
        return layer.copies is not None
    return layer.gate_up_copies is not None and layer.dispatcher.moves_rows_in_fp8


def write_weight_copies(model: Transformer) -> None:
    """Bring the copies up to date with the weights: after they were set, loaded or updated."""
    for _, weight, copies in _copied(model):
        write_copies(weight, copies)


def multiplies_in_fp8(model: Transformer) -> bool:
    """Whether any module does."""
    return next(_copied(model), None) is not None


def note_weights(model: Transformer) -> None:
    """Tell :mod:`moescale.kernels.fp8.errors` of the weights and their copies."""
    for kind, weight, copies in _copied(model):
        note_copies(f"{kind} weight", weight, copies)


def _copied(model: Transformer) -> Iterator[tuple[str, torch.Tensor, Copies]]:
    for module in model.layers.modules():
        if isinstance(module, Linear) and module.copies is not None:
            yield "linear", module.weight, module.copies
        if isinstance(module, RoutedExperts) and module.gate_up_copies is not None:
            assert module.down_copies is not None
            yield "experts", module.gate_up, module.gate_up_copies
            yield "experts", module.down, module.down_copies
