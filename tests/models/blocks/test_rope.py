import math

import pytest
import torch

from moescale.config import YarnConfig
from moescale.models.blocks.rope import rope_tables, softmax_scale, yarn_mscale
from tiny import tiny_config

CPU = torch.device("cpu")


def yarn(**overrides) -> YarnConfig:
    fields = dict(
        factor=40.0,
        original_max_sequence_length=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=0.707,
        mscale_all_dim=0.707,
    )
    return YarnConfig(**(fields | overrides))


def test_without_yarn_the_first_pair_turns_by_one_radian_per_position():
    cos, sin = rope_tables(tiny_config(), 4, CPU)
    assert cos.shape == sin.shape == (4, 4)
    torch.testing.assert_close(cos[:, 0], torch.arange(4.0).cos())
    torch.testing.assert_close(sin[1], torch.tensor([1.0, 0.1, 0.01, 0.001]).sin())


def test_yarn_leaves_fast_pairs_and_divides_slow_ones_by_the_factor():
    config = tiny_config(qk_rope_head_dim=64, yarn=yarn())
    _, sin = rope_tables(config, 2, CPU)
    _, plain = rope_tables(tiny_config(qk_rope_head_dim=64), 2, CPU)
    angle, original = sin[1].asin(), plain[1].asin()
    # Published values for DeepSeek-V2: the ramp runs from pair 10 to pair 23.
    torch.testing.assert_close(angle[1:11], original[1:11])
    torch.testing.assert_close(angle[23:], original[23:] / 40, rtol=1e-4, atol=1e-9)
    assert (angle[11:23] < original[11:23]).all() and (angle[11:23] > original[11:23] / 40).all()


def test_the_amplitude_is_the_ratio_of_the_two_mscales_and_1_when_they_are_equal():
    equal, _ = rope_tables(tiny_config(yarn=yarn()), 1, CPU)
    assert (equal == 1).all()
    only_mscale, _ = rope_tables(tiny_config(yarn=yarn(mscale=1.0, mscale_all_dim=0.0)), 1, CPU)
    assert only_mscale[0, 0].item() == pytest.approx(0.1 * math.log(40) + 1)


def test_the_softmax_scale_carries_the_temperature_squared_only_with_mscale_all_dim():
    plain = tiny_config().qk_head_dim ** -0.5
    assert softmax_scale(tiny_config()) == plain
    assert softmax_scale(tiny_config(yarn=yarn(mscale_all_dim=0.0))) == plain
    assert softmax_scale(tiny_config(yarn=yarn())) == pytest.approx(plain * (0.0707 * math.log(40) + 1) ** 2)
    assert yarn_mscale(1.0, 0.707) == 1.0


def test_a_ramp_of_no_width_does_not_divide_by_zero():
    config = tiny_config(yarn=yarn(beta_fast=1.0, beta_slow=1.0, original_max_sequence_length=7))
    cos, sin = rope_tables(config, 8, CPU)
    assert cos.isfinite().all() and sin.isfinite().all()
