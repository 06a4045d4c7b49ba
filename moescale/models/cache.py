"""The key/value cache of decoding: what attention keeps of the tokens a model has read already.

Keys and values are cached as attention takes them: rotated, of latent attention the full heads instead of the latents,
of grouped queries the heads they share. Decoding is for the samples of a run, a few hundred tokens at a time, so
attention runs by its definition and no block may come before another. A windowed layer keeps older keys too and does
not see them.
"""

from __future__ import annotations

import torch

from moescale.kernels.attention import Documents, reference


class LayerCache:
    """Keys and values of one layer, with room for ``capacity`` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        softmax_scale: float,
        documents: Documents | None = None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As :func:`moescale.kernels.attention.attention`, of the next S tokens to them and all before; keeps theirs.

        Shapes: q [B, S, N, Dqk], k [B, S, Nkv, Dqk], v [B, S, Nkv, Dv]; result [B, S, N, Dv].
        """
        assert documents is None, "a cache holds one document"
        keys, values = self._extend(k, v)
        end = self.length
        positions = torch.arange(end - q.shape[1], end, device=q.device)[:, None]  # [S, 1]
        others = torch.arange(end, device=q.device)[None]  # [1, end]
        visible = others <= positions
        if window is not None:
            visible = visible & (others > positions - window)
        return reference.attention(q, keys, values, visible[None], sinks, softmax_scale)

    def _extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start, self.length = self.length, self.length + k.shape[1]
        assert self.length <= self.capacity, "more tokens than the cache has room for"
        if self._keys is None or self._values is None:
            self._keys = k.new_empty(k.shape[0], self.capacity, *k.shape[2:])
            self._values = v.new_empty(v.shape[0], self.capacity, *v.shape[2:])
        self._keys[:, start : self.length] = k
        self._values[:, start : self.length] = v
        return self._keys[:, : self.length], self._values[:, : self.length]


class KeyValueCache:
    """One :class:`LayerCache` for each of ``num_layers`` layers."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Tokens read so far; all layers agree on it between two forward passes."""
        return self.layers[0].length
