import pytest
import torch

from moescale.kernels.attention import Documents
from moescale.models.transformer import Transformer, build_on_meta, initialize
from tiny import tiny_config


def build(dtype: torch.dtype = torch.float32, **overrides) -> Transformer:
    model = build_on_meta(tiny_config(**overrides), dtype).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))  # so that a parameter left out shows
    initialize(model, seed=0)
    return model


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(3))


def test_initialization_fills_every_parameter_and_depends_on_the_seed_alone():
    first, second = build(), build()
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert one.isfinite().all(), name
        assert torch.equal(one, other), name
    weight = first.layers[1].feed_forward.experts.gate_up
    assert weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert not torch.equal(weight[0], weight[1])
    bf16 = build(torch.bfloat16).layers[1].feed_forward.experts.gate_up
    assert torch.equal(bf16, weight.bfloat16())


def test_a_later_token_changes_no_earlier_logits():
    model = build()
    one = tokens()
    other = one.clone()
    other[:, 8] = (other[:, 8] + 1) % 96
    with torch.no_grad():
        first, second = model(one).logits, model(other).logits
    torch.testing.assert_close(first[:, :8], second[:, :8], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first[:, 8:], second[:, 8:], rtol=1e-3, atol=1e-3)


def test_attention_stays_within_documents():
    """A document gives the same logits at any place in a sequence as it gives alone: RoPE is relative."""
    model = build()
    sequence = tokens(1, 12)
    starts = torch.arange(12) == 5
    with torch.no_grad():
        together = model(sequence, documents=Documents.from_starts(starts.unsqueeze(0), torch.device("cpu"))).logits
        first, second = model(sequence[:, :5]).logits, model(sequence[:, 5:]).logits
    torch.testing.assert_close(together, torch.cat([first, second], dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("overrides", [{}, {"q_lora_rank": 24}, {"tie_embeddings": True}, {"num_shared_experts": 0}])
def test_recomputed_blocks_give_the_same_loss_and_gradients(overrides):
    results = []
    for layers in (frozenset(), frozenset({0, 1, 2})):
        model = build(**overrides)
        model.recompute_layers = layers
        output = model(tokens(), targets=tokens().roll(-1, 1))
        (output.loss_sum + output.aux_loss).backward()
        results.append((output.loss_sum.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_every_token_is_counted_top_k_times_in_every_moe_layer():
    output = build()(tokens(), targets=tokens())
    assert output.tokens_per_expert.shape == (2, 8)
    assert output.tokens_per_expert.sum(-1).tolist() == [24 * 2, 24 * 2]


def test_a_dense_model_has_no_auxiliary_loss_and_no_counts():
    output = build(num_experts=None)(tokens(), targets=tokens())
    assert output.aux_loss.item() == 0
    assert output.tokens_per_expert is None
