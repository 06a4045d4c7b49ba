import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moescale.config import ModelConfig
from moescale.lora import parse_lora
from moescale.models.flops import flops_per_token, peak_flops
from moescale.models.transformer import build_on_meta, initialize
from tiny import tiny_config


def coder_v2_lite() -> ModelConfig:
    return tiny_config(
        vocab_size=102400,
        hidden_size=2048,
        num_layers=27,
        num_heads=16,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        dense_intermediate_size=10944,
        expert_intermediate_size=1408,
        num_experts=64,
        num_shared_experts=2,
        top_k=6,
    )


def test_the_public_model_has_its_published_size_and_arithmetic():
    config = coder_v2_lite()
    model = build_on_meta(config, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 15_706_484_224
    assert flops_per_token(config, 0) / 6e9 == pytest.approx(2.451, abs=5e-4), "parameters that a token meets"
    assert flops_per_token(config, 2048) / 1e9 == pytest.approx(15.56, abs=5e-3)


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_the_count_is_three_times_torchs_of_a_dense_models_forward(q_lora_rank):
    """Without experts every GEMM is visible to torch's counter; it counts the whole square of attention, or nothing."""
    config = tiny_config(num_experts=None, q_lora_rank=q_lora_rank, aux_loss_alpha=0.0)
    model = build_on_meta(config, torch.float32).to_empty(device="cpu")
    initialize(model, seed=0)
    tokens = torch.zeros(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    half_square = config.num_layers * config.num_heads * 64 * 64 * (config.qk_head_dim + config.v_head_dim)
    forward = flops_per_token(config, 64) * 64 / 3
    assert counter.get_total_flops() in (forward + half_square, forward - half_square)


def test_a_token_meets_its_own_experts_only():
    """By hand: attention, router, two of eight experts and the shared one in each MoE layer, one dense layer."""
    config = tiny_config()
    attention = 32 * 2 * 24 + 32 * (16 + 8) + 16 * 2 * (16 + 16) + 2 * 16 * 32
    moe, dense, output = 8 * 32 + 3 * 32 * 24 * (2 + 1), 3 * 32 * 64, 32 * 96
    assert flops_per_token(config, 0) == 6 * (3 * attention + 2 * moe + dense + output)
    assert flops_per_token(config, 128) - flops_per_token(config, 0) == 3 * 3 * 2 * (24 + 16) * 128


def test_frozen_weights_take_four_operations_of_six_and_adapters_their_own():
    """By hand again: rank 4 on attention (four projections in each of three layers) and on the chosen two experts."""
    config, lora = tiny_config(), parse_lora("rank=4,targets=attention+experts")
    attention = 4 * ((32 + 48) + (32 + 24) + (16 + 64) + (32 + 32))
    experts = 2 * 4 * ((32 + 48) + (24 + 32))
    frozen = flops_per_token(config, 0) * 4 / 6
    assert flops_per_token(config, 0, lora) == pytest.approx(frozen + 6 * (3 * attention + 2 * experts))
    scores = flops_per_token(config, 128) - flops_per_token(config, 0)
    assert flops_per_token(config, 128, lora) - flops_per_token(config, 0, lora) == pytest.approx(scores)


def test_no_peak_rate_is_claimed_for_the_cpu():
    assert peak_flops(torch.device("cpu")) is None
