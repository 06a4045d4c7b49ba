"""The decoder in training form: embedding, blocks, final norm, and the loss. A family gives its attention.

A model is built on the meta device (:func:`build_on_meta`), given memory on its device, then filled either by
:func:`initialize` or from a checkpoint. Logits exist only where a caller asks for them: training goes through the
linear cross-entropy, which never holds a micro-batch's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moescale.boxes import Box, box_shape, relative_to, whole_box
from moescale.config import ModelConfig
from moescale.kernels.attention import Documents
from moescale.kernels.cross_entropy import linear_cross_entropy
from moescale.models.blocks.moe import DenseFeedForward, FeedForwardOutput, MixtureOfExperts, Router
from moescale.models.blocks.norm import RMSNorm
from moescale.models.cache import KeyValueCache, LayerCache
from moescale.models.frozen_fp8 import box_to_quantize, is_scale, quantize_into, weights_in_fp8
from moescale.models.registry import family_of

ADAPTER = ".adapter."
"""What the names of parameters of adapters have in them (:mod:`moescale.models.lora`), and no others."""
AttentionClass = Callable[[Any, int], nn.Module]
"""(configuration, layer) -> the layer's attention: (x [B, S, H], cos, sin, documents, cache) -> [B, S, H]."""
Positions = Callable[[Any, int, torch.device], tuple[torch.Tensor, torch.Tensor]]
"""(configuration, sequence length, device) -> cosine and sine tables."""


class ModelOutput(NamedTuple):
    """What a forward pass returns; ``None`` where it was not asked for, or the model has no MoE layer."""

    loss_sum: torch.Tensor | None
    """Scalar fp32: cross-entropy in nats, summed over the target tokens."""
    logits: torch.Tensor | None
    """[B, S, V], without targets only."""
    aux_loss: torch.Tensor
    """Scalar fp32: load-balancing loss summed over MoE layers, not yet times ``aux_loss_alpha``."""
    tokens_per_expert: torch.Tensor | None
    """[MoE layers, E] int32: routed rows each expert received, padding left out; of tokens with a target only where
    biases follow it."""


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionClass) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward: DenseFeedForward | MixtureOfExperts
        if config.is_moe_layer(layer):
            self.feed_forward = MixtureOfExperts(config)
        else:
            self.feed_forward = DenseFeedForward(config.hidden_size, config.dense_intermediate_size)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        documents: Documents | None = None,
        counted: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> FeedForwardOutput:
        attended = self.attention(self.attention_norm(x), cos, sin, documents, cache)
        normed, x = self.feed_forward_norm.after_adding(attended, x)
        output = self.feed_forward(normed, counted, padding)
        return FeedForwardOutput(x + output.hidden, output.aux_loss, output.tokens_per_expert)


class Transformer(nn.Module):
    """The whole model. Blocks in ``recompute_layers`` keep no activations but run forward again in the backward."""

    def __init__(self, config: ModelConfig, *, attention: AttentionClass, positions: Positions) -> None:
        super().__init__()
        self.config = config
        self.positions = positions
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, attention) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute_layers: frozenset[int] = frozenset()
        self.is_frozen = False  # but for its adapters
        self.has_dropout = False  # of adapters; the model itself has none
        self.output_gradient: torch.Tensor | None = None

    def set_gradient_buffers(self, buffer: Callable[[str], torch.Tensor | None]) -> None:
        """Take the buffer to which the loss adds the output weight's gradient."""
        self.output_gradient = buffer("embedding.weight" if self.output is None else "output.weight")

    @property
    def output_weight(self) -> torch.Tensor:
        """[V, H]: the weight of the last product, the embedding itself where the two are tied."""
        return self.embedding.weight if self.output is None else self.output.weight

    @torch.no_grad()
    def move_choice_biases(self, load: torch.Tensor, rate: float) -> None:
        """Add ``rate * sign(mean load - load)`` to every router's choice bias, after a step with this load.

        DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) with Wang et al. 2024 (arXiv:2408.15664, algorithm 1).

        Args:
            load: [MoE layers, E] int64, of the whole step over all ranks.
        """
        # Compared as integers: mean and load would be rounded.
        directions = (load.sum(-1, keepdim=True) - load.shape[-1] * load).sign().float()
        routers = [module for module in self.modules() if isinstance(module, Router)]
        for router, direction in zip(routers, directions, strict=True):
            if router.choice_bias is not None:
                router.choice_bias += rate * direction

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        documents: Documents | None = None,
        cache: KeyValueCache | None = None,
        padding: torch.Tensor | None = None,
    ) -> ModelOutput:
        """Run ``tokens`` [B, S] int64; with ``targets`` [B, S] (-100: not a target) return the loss, else logits.

        ``documents`` keeps attention within documents. ``cache`` holds the tokens before these, which attention sees
        as well, and takes these in. ``padding`` [B, S] bool: tokens that only fill a sequence; the auxiliary loss and
        ``tokens_per_expert`` are of the others.
        """
        read = 0 if cache is None else cache.length
        cos, sin = self.positions(self.config, read + tokens.shape[1], tokens.device)
        cos, sin = cos[read:], sin[read:]
        # Tokens that are not trained on must not move the biases of the choice.
        counted = targets >= 0 if targets is not None and self.config.has_choice_bias else None
        x = self.embedding(tokens)
        aux_loss = torch.zeros((), dtype=torch.float32, device=tokens.device)
        counts: list[torch.Tensor] = []
        for layer, block in enumerate(self.layers):
            if layer in self.recompute_layers and torch.is_grad_enabled():
                output = checkpoint(
                    *(block, x, cos, sin, documents, counted, padding),
                    use_reentrant=False,
                    preserve_rng_state=self.has_dropout,
                )
            else:
                held = None if cache is None else cache.layers[layer]
                output = block(x, cos, sin, documents, counted, padding, held)
            x = output.hidden
            if output.aux_loss is not None:
                aux_loss = aux_loss + output.aux_loss
                counts.append(output.tokens_per_expert)
        x = self.norm(x)
        loss_sum = logits = None
        if targets is None:
            logits = nn.functional.linear(x, self.output_weight)
        else:
            loss_sum = linear_cross_entropy(
                x.flatten(0, 1), self.output_weight, targets.flatten(), weight_gradient=self.output_gradient
            )
        return ModelOutput(loss_sum, logits, aux_loss, torch.stack(counts) if counts else None)


def build_on_meta(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """Build the model without memory: every parameter is on the meta device, in ``dtype``."""
    with torch.device("meta"):
        return family_of(config).build(config).to(dtype)


def named_weights(model: Transformer) -> dict[str, torch.Tensor]:
    """Return what a checkpoint folder holds of the model: its parameters, and the buffers that training changes.

    Adapters and the scales of weights in fp8 are no part of it.
    """
    weights = model.state_dict(keep_vars=True).items()
    return {name: weight for name, weight in weights if ADAPTER not in name and not is_scale(name)}


def initialize(model: Transformer, seed: int) -> None:
    """Fill every parameter as the published code does: N(0, initializer_std), gains 1, biases and buffers 0.

    Each parameter draws in fp32 from a generator of its device, seeded by ``seed`` and the parameter's own position,
    so the weights depend on neither dtype nor on how the model is later divided. CPU and GPU draw different numbers.
    """
    draw(model, seed, lambda name, parameter: PlacedPart(parameter, whole_box(parameter.shape), parameter.shape))
    for buffer in model.buffers():
        buffer.zero_()


class PlacedPart(NamedTuple):
    """A part of a parameter, the box that it is of it, and the parameter's shape."""

    tensor: torch.Tensor
    box: Box
    shape: tuple[int, ...]


def draw(
    model: Transformer,
    seed: int,
    place: Callable[[str, nn.Parameter], PlacedPart],
    chosen: Callable[[str], bool] = lambda name: True,
) -> dict[str, torch.Tensor]:
    """Fill the ``chosen`` parameters' parts, which ``place`` returns, as :func:`initialize` does.

    Adapters come last: a model's own weights are drawn alike with and without. Returns by name what
    :func:`quantize_into` says of the weights in fp8; their scales are not drawn.
    """
    in_fp8, std, quantized = weights_in_fp8(model), model.config.initializer_std, {}
    drawn = (item for item in model.named_parameters() if not is_scale(item[0]))
    for position, (name, parameter) in enumerate(sorted(drawn, key=lambda item: ADAPTER in item[0])):
        if not chosen(name):
            continue
        part = place(name, parameter)
        if name not in in_fp8:
            initialize_part(part.tensor, name, position, part.shape, part.box, std, seed)
            continue
        scales = place(in_fp8[name], model.get_parameter(in_fp8[name]))
        box = box_to_quantize(part.box, scales.box, part.shape) or tuple(slice(0, 0) for _ in part.shape)
        weight = torch.empty(box_shape(box), dtype=model.embedding.weight.dtype, device=part.tensor.device)
        initialize_part(weight, name, position, part.shape, box, std, seed)
        read = partial(_box_of, weight, box)
        quantized[name] = quantize_into(part.tensor, part.box, scales.tensor, scales.box, part.shape, read)
    return quantized


def _box_of(part: torch.Tensor, box: Box, wanted: Box) -> torch.Tensor:
    """The box ``wanted`` of a parameter, of which ``part`` is the box ``box``."""
    return part[relative_to(wanted, box)]


@torch.no_grad()
def initialize_part(
    part: torch.Tensor,
    name: str,
    position: int,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    std: float,
    seed: int,
) -> None:
    """Fill ``part``, the box ``index`` of the parameter of that name, position and shape, as :func:`initialize` does.

    Draws the whole parameter, matrix by matrix, and keeps the part. Of an adapter A is uniform within the reciprocal
    root of its columns, as ``torch.nn.Linear`` and PEFT draw it, and B zero.
    """
    if name.endswith("norm.weight"):
        part.fill_(1)
    elif name.endswith((".bias", "_bias")) or (ADAPTER in name and name.endswith("b")):
        part.zero_()
    else:
        generator = torch.Generator(part.device).manual_seed((seed * 1_000_003 + position) % 2**63)
        # One slice of dim 0 at a time keeps the fp32 copy small beside stacked experts.
        for number in range(index[0].stop) if len(shape) == 3 else (None,):
            drawn = torch.empty(shape if number is None else shape[1:], device=part.device)
            if ADAPTER in name:
                drawn.uniform_(-(shape[-1] ** -0.5), shape[-1] ** -0.5, generator=generator)
            else:
                drawn.normal_(0.0, std, generator=generator)
            if number is None:
                part.copy_(drawn[index])
            elif number >= index[0].start:
                part[number - index[0].start].copy_(drawn[index[1:]])
