"""Forward and backward of a step's micro-batches; their sums stay on the device.

On a GPU the work of a micro-batch is the same thousands of kernel launches every time, more than the host can queue in
the time they run. So the second micro-batch of a shape is recorded as a CUDA graph, and from then on replayed: the host
copies tokens and targets into the graph's inputs and launches it. Whatever a graph cannot hold (other shapes, several
ranks) runs as it is. So do micro-batches with documents: how many there are decides a shape, and one that differs from
the recorded would need a second set of activations beside the graph's own.
"""

from __future__ import annotations

import torch

from moescale.kernels.attention import Documents
from moescale.model.transformer import ModelOutput, Transformer
from moescale.runtime.ranks import Ranks


class MicroBatches:
    """Runs micro-batches of ``model``; after a step, ``loss_sum``, ``aux_loss`` and ``expert_rows`` hold its sums."""

    def __init__(self, model: Transformer, *, capture: bool) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        # A recording needs gradients at fixed addresses: the buffers that fp32 parameters do without.
        has_buffers = all(parameter.dtype != torch.float32 for parameter in model.parameters())
        self.capture = capture and self.device.type == "cuda" and has_buffers
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
        self._seen: tuple[int, ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_inputs: tuple[torch.Tensor, torch.Tensor] | None = None

    def start_step(self, *, num_targets: int, num_micro_batches: int) -> None:
        """Clear the sums; every token's loss then counts ``1 / num_targets`` and aux losses their mean times alpha."""
        self.loss_sum.zero_()
        self.aux_loss.zero_()
        self.expert_rows.zero_()
        self._target_weight.fill_(1.0 / max(1, num_targets))
        self._aux_weight.fill_(self.model.config.aux_loss_alpha / num_micro_batches)

    def run(self, tokens: torch.Tensor, targets: torch.Tensor, documents: Documents | None) -> None:
        """Forward and backward of one micro-batch, [B, S] each; adds to the sums and to the gradients."""
        if not self.capture or documents is not None:
            self._run(tokens.to(self.device), targets.to(self.device), documents)
            return
        shape = tuple(tokens.shape)
        if self._graph_inputs is not None and self._graph_inputs[0].shape == shape:
            self._replay(tokens, targets)
        elif self._graph is None and self._seen == shape:
            self._record(tokens, targets)
            self._replay(tokens, targets)
        else:  # the first time compiles and tunes, which a recording must not
            self._seen = shape
            self._run(tokens.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True), None)

    def add_up(self, ranks: Ranks) -> None:
        """After a step's last micro-batch: make the sums those of all ranks. A collective, one reduction."""
        if ranks.size == 1:
            return
        values = torch.cat([self.loss_sum.view(1), self.aux_loss.view(1), self.expert_rows.flatten()]).double()
        ranks.sum(values)
        self.loss_sum.copy_(values[0])
        self.aux_loss.copy_(values[1])
        self.expert_rows.copy_(values[2:].view_as(self.expert_rows))

    def _run(self, tokens: torch.Tensor, targets: torch.Tensor, documents: Documents | None) -> None:
        output: ModelOutput = self.model(tokens, targets=targets, documents=documents)
        assert output.loss_sum is not None
        loss = output.loss_sum * self._target_weight
        if self.model.config.aux_loss_alpha:
            loss = loss + output.aux_loss * self._aux_weight
        loss.backward()
        self.loss_sum += output.loss_sum.detach()
        self.aux_loss += output.aux_loss.detach()
        if output.tokens_per_expert is not None:
            self.expert_rows += output.tokens_per_expert

    def _record(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        inputs = (torch.empty_like(tokens, device=self.device), torch.empty_like(targets, device=self.device))
        # What earlier micro-batches left in the allocator's cache is out of reach for the graph's own memory pool.
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(inputs[0], inputs[1], None)
        self._graph, self._graph_inputs = graph, inputs

    def _replay(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        assert self._graph is not None and self._graph_inputs is not None
        for buffer, value in zip(self._graph_inputs, (tokens, targets), strict=True):
            buffer.copy_(value, non_blocking=True)
        self._graph.replay()
