"""Forward and backward of a step's micro-batches; their sums stay on the device.

On a GPU every micro-batch makes the same thousands of kernel launches, more than the host can queue in the time they
run. So the second micro-batch of a shape is captured as a CUDA graph, which is replayed from then on: the host copies
tokens, targets and, if the corpus has them, document boundaries and padding into the graph's inputs and launches it.
This also works on several ranks if nothing in the model calls the host: weights whole on every rank, and a dispatcher
that reads peer memory.

A graph keeps the memory of its activations. It is dropped before a micro-batch of another shape runs, because two sets
of activations might not fit. Boundaries are kept in a buffer with room for at most twice their number; it only grows.
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule

from moescale.coordinates import Coordinates
from moescale.kernels.attention import LEAST_OFFSETS, Documents
from moescale.models.blocks.moe import RoutedExperts
from moescale.models.transformer import ModelOutput, Transformer
from moescale.runtime.ranks import Ranks


class MicroBatches:
    """Runs micro-batches of ``model`` and accumulates the step's ``loss_sum``, ``aux_loss`` and ``expert_rows``."""

    def __init__(self, model: Transformer, *, capture: bool) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._is_compiled = any(layer._compiled_call_impl is not None for layer in model.layers)
        self.capture = capture and self.device.type == "cuda" and _is_recordable(model)
        config = model.config
        scalar = torch.zeros((), device=self.device)
        self.loss_sum = scalar.clone()
        """fp32 scalar: cross-entropy summed over the step's target tokens."""
        self.aux_loss = scalar.clone()
        """fp32 scalar: auxiliary loss summed over MoE layers and micro-batches."""
        shape = (config.num_moe_layers, config.num_experts or 0)
        self.expert_rows = torch.zeros(shape, dtype=torch.int64, device=self.device)
        """[MoE layers, E]: rows routed to each expert."""
        self._target_weight = scalar.clone()
        self._aux_weight = scalar.clone()
        self._num_offsets = LEAST_OFFSETS
        self._seen: dict[str, torch.Size] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_inputs: dict[str, torch.Tensor] = {}

    def start_step(self, *, num_targets: int, num_micro_batches: int) -> None:
        """Clear the sums. A token's loss has weight ``1 / num_targets``; aux losses count as their mean times alpha."""
        self.loss_sum.zero_()
        self.aux_loss.zero_()
        self.expert_rows.zero_()
        self._target_weight.fill_(1.0 / max(1, num_targets))
        self._aux_weight.fill_(self.model.config.aux_loss_alpha / num_micro_batches)

    def run(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        document_starts: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> None:
        """Run forward and backward of one micro-batch (CPU tensors [B, S]), adding to the sums and the gradients."""
        inputs = {"tokens": tokens, "targets": targets}
        if padding is not None:
            inputs["padding"] = padding
        if document_starts is not None:
            documents = Documents.from_starts(document_starts, self.device, self._num_offsets)
            self._num_offsets = documents.offsets.numel()
            inputs |= documents._asdict()
        shapes = {name: value.shape for name, value in inputs.items()}
        if self._graph is not None and shapes == self._seen:
            self._replay(inputs)
        elif self.capture and shapes == self._seen:
            self._record(inputs)
            self._replay(inputs)
        else:  # the first run compiles and tunes, which a capture must not
            self.forget()
            self._seen = shapes
            self._run({name: value.to(self.device, non_blocking=True) for name, value in inputs.items()})

    def phase(self, number: int) -> str:
        """Return what a step's micro-batch ``number`` is, and after a colon what takes it longer than later ones."""
        if self._seen is None and (self.device.type == "cuda" or self._is_compiled):
            return f"micro-batch {number}: compiling and tuning kernels"
        if self.capture and self._seen is not None and self._graph is None:
            return f"micro-batch {number}: recording it as a CUDA graph"
        return f"micro-batch {number}"

    def forget(self) -> None:
        """Drop the captured graph, if any, and its memory."""
        if self._graph is not None:
            torch.cuda.synchronize(self.device)
            self._graph, self._graph_inputs = None, {}
            torch.cuda.empty_cache()

    def add_up(self, ranks: Ranks, coordinates: Coordinates) -> None:
        """Reduce the sums over all ranks, after the last micro-batch of a step. A collective, one reduction.

        ``coordinates`` are this rank's; ranks that repeat the work of another one do not contribute.
        """
        if ranks.size == 1:
            return
        values = torch.cat([self.loss_sum.view(1), self.aux_loss.view(1), self.expert_rows.flatten()]).double()
        if not coordinates.counts_tokens:
            values.zero_()
        ranks.sum(values)
        self.loss_sum.copy_(values[0])
        self.aux_loss.copy_(values[1])
        self.expert_rows.copy_(values[2:].view_as(self.expert_rows))

    def _run(self, inputs: dict[str, torch.Tensor]) -> None:
        documents = [inputs[name] for name in Documents._fields if name in inputs]
        output: ModelOutput = self.model(
            inputs["tokens"],
            targets=inputs["targets"],
            documents=Documents(*documents) if documents else None,
            padding=inputs.get("padding"),
        )
        assert output.loss_sum is not None
        loss = output.loss_sum * self._target_weight
        if self.model.config.aux_loss_alpha:
            loss = loss + output.aux_loss * self._aux_weight
        loss.backward()
        self.loss_sum += output.loss_sum.detach()
        self.aux_loss += output.aux_loss.detach()
        if output.tokens_per_expert is not None:
            self.expert_rows += output.tokens_per_expert

    def _record(self, inputs: dict[str, torch.Tensor]) -> None:
        held = {name: torch.empty_like(value, device=self.device) for name, value in inputs.items()}
        # The graph's private memory pool cannot use blocks that earlier micro-batches left in the allocator's cache.
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(held)
        self._graph, self._graph_inputs = graph, held

    def _replay(self, inputs: dict[str, torch.Tensor]) -> None:
        assert self._graph is not None
        for name, buffer in self._graph_inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        self._graph.replay()


def _is_recordable(model: Transformer) -> bool:
    """Return True if a micro-batch can be captured: it runs on the device alone, at fixed addresses.

    Gradients must be in buffers, which an all-fp32 model does not have. FSDP2 allocates memory and calls the host in
    every layer. A recomputed block with dropout restores its random state on the host.
    """
    has_buffers = any(parameter.dtype != torch.float32 for parameter in model.parameters())
    repeats_random_state = model.has_dropout and bool(model.recompute_layers)
    is_whole = not any(isinstance(module, FSDPModule) for module in model.modules())
    dispatchers = [module.dispatcher for module in model.modules() if isinstance(module, RoutedExperts)]
    is_free = has_buffers and is_whole and not repeats_random_state
    return is_free and all(dispatcher.is_recordable for dispatcher in dispatchers)
