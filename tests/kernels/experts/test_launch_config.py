"""Launch tables: what is shipped parses, and a lookup takes the nearest entry."""

from __future__ import annotations

import pytest
import torch

from moescale.errors import ConfigError
from moescale.kernels.experts.launch_config import (
    KERNELS,
    LaunchConfig,
    default_launch,
    find_launch,
    load_tables,
    parse_table,
)

H200 = "NVIDIA H200"


def table(*entries):
    launch = {"block_m": 128, "block_n": 128, "block_k": 64}
    return parse_table(
        {
            "gpu": "G",
            "entries": [
                {"kernel": k, "rows": r, "num_experts": e, "n": n, "k": 64, "launch": {**launch, "num_stages": s}}
                for k, r, e, n, s in entries
            ],
        }
    )


def test_nearest_goes_by_rows_per_expert_then_by_experts():
    tuned = table(("up", 800, 8, 256, 2), ("up", 6400, 64, 256, 3), ("up", 64000, 64, 256, 4), ("down", 800, 8, 256, 5))
    assert tuned.nearest("up", 900, 8, 256, 64).num_stages == 2
    assert tuned.nearest("up", 7200, 64, 256, 64).num_stages == 3
    assert tuned.nearest("up", 100_000, 16, 256, 64).num_stages == 4
    assert tuned.nearest("down", 1, 64, 256, 64).num_stages == 5
    assert tuned.nearest("up_wgrad", 900, 8, 256, 64) is None


def test_nearest_prefers_the_same_weight_shape():
    tuned = table(("up", 800, 8, 256, 2), ("up", 80_000, 8, 512, 3))
    assert tuned.nearest("up", 800, 8, 512, 64).num_stages == 3
    assert tuned.nearest("up", 800, 8, 1024, 64).num_stages == 2


def test_the_shipped_h200_table_covers_every_kernel():
    entries = load_tables()[H200].entries
    assert {entry.kernel for entry in entries} == set(KERNELS)


def test_a_gpu_without_a_table_gets_the_default_of_its_architecture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    device = torch.device("cuda:7")
    found = find_launch("up", device, torch.bfloat16, 1000, 8, 256, 128)
    assert found == default_launch((8, 0), torch.bfloat16)
    # two operands, all stages, in the 164 KiB of shared memory of an A100
    assert 2 * found.block_k * (found.block_m + found.block_n) * found.num_stages < 164 * 1024


def test_a_launch_with_an_impossible_store_split_is_refused():
    with pytest.raises(ConfigError, match=r"store_splits \(3\) must be 1, 2 or 4"):
        LaunchConfig(block_m=16, block_n=16, block_k=16, store_splits=3)
