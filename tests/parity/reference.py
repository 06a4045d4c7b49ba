"""DeepSeek-V2 and V3 written from their published definitions (arXiv:2405.04434, arXiv:2412.19437), for tests.

Slow and plain on purpose: one loop per layer, per expert and per sequence, on tensors under their Hugging Face names,
with nothing shared with the package. fp32 or fp64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


def forward(
    config: dict[str, Any], weights: Tensors, tokens: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [B, S, V], mean cross-entropy over targets >= 0, and the auxiliary loss summed over MoE layers."""
    x = weights["model.embed_tokens.weight"][tokens]
    aux_loss = x.new_zeros(())
    for layer in range(config["num_hidden_layers"]):
        part = _below(weights, f"model.layers.{layer}.")
        normed = _rms_norm(x, part["input_layernorm.weight"], config["rms_norm_eps"])
        x = x + _attention(config, _below(part, "self_attn."), normed)
        normed = _rms_norm(x, part["post_attention_layernorm.weight"], config["rms_norm_eps"])
        mlp = _below(part, "mlp.")
        experts = config["n_routed_experts"]
        if experts and layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0:
            hidden, layer_aux = _mixture(config, mlp, normed)
            aux_loss = aux_loss + layer_aux
        else:
            hidden = _gated(mlp, normed)
        x = x + hidden
    x = _rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    output = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    logits = x @ output.T
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten()), aux_loss


def _below(weights: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _linear(part: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    y = x @ part[f"{name}.weight"].T
    return y + part[f"{name}.bias"] if f"{name}.bias" in part else y


def _gated(part: Tensors, x: torch.Tensor) -> torch.Tensor:
    gate = _linear(part, "gate_proj", x)
    return _linear(part, "down_proj", gate * torch.sigmoid(gate) * _linear(part, "up_proj", x))


def _attention(config: dict[str, Any], part: Tensors, x: torch.Tensor) -> torch.Tensor:
    batch, length, _ = x.shape
    heads, nope, rope, value = (
        config[name] for name in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    if config["q_lora_rank"] is None:
        q = _linear(part, "q_proj", x)
    else:
        q = _linear(part, "q_b_proj", _rms_norm(_linear(part, "q_a_proj", x), part["q_a_layernorm.weight"], 1e-6))
    q = q.view(batch, length, heads, nope + rope)
    compressed, k_rope = _linear(part, "kv_a_proj_with_mqa", x).split([config["kv_lora_rank"], rope], dim=-1)
    kv = _linear(part, "kv_b_proj", _rms_norm(compressed, part["kv_a_layernorm.weight"], 1e-6))
    kv = kv.view(batch, length, heads, nope + value)
    scale, angles, magnitude = _positions(config, length)
    outputs = []
    for head in range(heads):
        q_head = torch.cat([q[:, :, head, :nope], _rotate(q[:, :, head, nope:], angles, magnitude)], dim=-1)
        k_head = torch.cat([kv[:, :, head, :nope], _rotate(k_rope, angles, magnitude)], dim=-1)
        scores = q_head @ k_head.transpose(1, 2) * scale
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ kv[:, :, head, nope:])
    return _linear(part, "o_proj", torch.cat(outputs, dim=-1))


def _positions(config: dict[str, Any], length: int) -> tuple[float, torch.Tensor, float]:
    """Softmax scale, rotation angles [S, Dr/2], and the magnitude of cos and sin."""
    rope, base = config["qk_rope_head_dim"], config["rope_theta"]
    scale = (config["qk_nope_head_dim"] + rope) ** -0.5
    frequencies = [base ** (-2 * pair / rope) for pair in range(rope // 2)]
    magnitude = 1.0
    yarn = config["rope_scaling"]
    if yarn is not None:
        factor, original = yarn["factor"], yarn["original_max_position_embeddings"]

        def pair_of(rotations: float) -> float:
            return rope * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair_of(yarn["beta_fast"])), 0)
        high = float(min(math.ceil(pair_of(yarn["beta_slow"])), rope - 1))
        if low == high:
            high += 0.001
        for pair, frequency in enumerate(frequencies):
            slowed = min(1.0, max(0.0, (pair - low) / (high - low)))
            frequencies[pair] = frequency * (1 - slowed) + frequency / factor * slowed

        def mscale(coefficient: float) -> float:
            return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0

        magnitude = mscale(yarn["mscale"]) / mscale(yarn["mscale_all_dim"])
        if yarn["mscale_all_dim"]:
            scale *= mscale(yarn["mscale_all_dim"]) ** 2
    angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return scale, angles, magnitude


def _rotate(x: torch.Tensor, angles: torch.Tensor, magnitude: float) -> torch.Tensor:
    """Rotate the adjacent pairs of x [B, S, Dr]; the result may order its dims freely, as q and k agree."""
    cos, sin = (angles.cos() * magnitude).to(x.dtype), (angles.sin() * magnitude).to(x.dtype)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _mixture(config: dict[str, Any], part: Tensors, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, width = x.shape
    experts = config["n_routed_experts"]
    logits = x.reshape(-1, width) @ part["gate.weight"].T  # [T, E]
    if config["scoring_func"] == "sigmoid":
        weights, chosen, probabilities, balanced = _choose_by_sigmoid(config, part, logits)
    else:
        weights, chosen, probabilities = _choose_by_softmax(config, logits)
        balanced = chosen
    rows = x.reshape(-1, width)
    output = torch.zeros_like(rows)
    for expert in range(experts):
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        if len(token):
            expert_output = _gated(_below(part, f"experts.{expert}."), rows[token])
            output = output.index_add(0, token, expert_output * weights[token, slot, None])
    if config["n_shared_experts"]:
        output = output + _gated(_below(part, "shared_experts."), rows)
    return output.view_as(x), _auxiliary_loss(config, probabilities, balanced, batch, length)


def _choose_by_softmax(config: dict[str, Any], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DeepSeek-V2: weights and chosen experts [T, K], probabilities [T, E]."""
    experts, top_k = config["n_routed_experts"], config["num_experts_per_tok"]
    probabilities = logits.softmax(-1)
    candidates = probabilities
    if config["topk_method"] == "group_limited_greedy":
        groups = config["n_group"]
        best = probabilities.view(-1, groups, experts // groups).amax(-1)
        kept = torch.zeros_like(best).scatter(1, best.topk(config["topk_group"]).indices, 1.0)
        candidates = probabilities * kept.repeat_interleave(experts // groups, dim=1)
    weights, chosen = candidates.topk(top_k, dim=-1)
    if config["norm_topk_prob"] and top_k > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    else:
        weights = weights * config["routed_scaling_factor"]
    return weights, chosen, probabilities


def _choose_by_sigmoid(
    config: dict[str, Any], part: Tensors, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """DeepSeek-V3 (arXiv:2412.19437, equations 12 to 20), token by token.

    Returns weights and chosen experts [T, K], scores of each token divided by their sum [T, E], and the experts [T, K]
    that the auxiliary loss counts: those of the highest scores, without bias and groups.
    """
    experts, top_k, groups = config["n_routed_experts"], config["num_experts_per_tok"], config["n_group"]
    scores = 1 / (1 + torch.exp(-logits))
    size = experts // groups
    chosen = []
    for biased in (scores + part["gate.e_score_correction_bias"]).tolist():
        best = [sum(sorted(biased[group * size : (group + 1) * size])[-2:]) for group in range(groups)]
        kept = sorted(range(groups), key=lambda group, best=best: -best[group])[: config["topk_group"]]
        open_ones = [expert for expert in range(experts) if expert // size in kept]
        chosen.append(sorted(open_ones, key=lambda expert, biased=biased: -biased[expert])[:top_k])
    picked = torch.tensor(chosen)
    weights = scores.gather(1, picked)
    if config["norm_topk_prob"]:
        weights = weights / weights.sum(-1, keepdim=True)
    shares = scores / scores.sum(-1, keepdim=True)
    return weights * config["routed_scaling_factor"], picked, shares, scores.topk(top_k, dim=-1).indices


def _auxiliary_loss(
    config: dict[str, Any], probabilities: torch.Tensor, chosen: torch.Tensor, batch: int, length: int
) -> torch.Tensor:
    experts, top_k = config["n_routed_experts"], config["num_experts_per_tok"]
    if not config["seq_aux"]:
        batch, length = 1, batch * length
    total = probabilities.new_zeros(())
    for sequence in range(batch):
        here = slice(sequence * length, (sequence + 1) * length)
        share = torch.bincount(chosen[here].flatten(), minlength=experts).to(probabilities) * experts / (length * top_k)
        total = total + (share * probabilities[here].mean(0)).sum()
    return total / batch
