"""Plans and checkpoints that version 0.1.0 wrote are read, and mean what they meant; the files are in tests/stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moescale.convert.hf_config import read_model_config
from moescale.plan import load_plan
from moescale.runtime.checkpoint import verify
from moescale.runtime.checkpoint_store import CheckpointStore
from plans import make_trainer

STORED = Path(__file__).parent / "stored" / "0.1.0"
# The model and formats of the stored run, in the words of tests/distributed/plans.py.
MODEL = dict(
    vocab_size=16,
    hidden_size=16,
    num_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    dense_intermediate_size=16,
    expert_intermediate_size=8,
    num_experts=4,
)
FORMATS = dict(
    compute_dtype="bf16", optimizer_state_dtype="int8", master_weight_format="bf16_remainder", gradient_dtype="bf16"
)


def test_a_plan_is_read_and_is_for_the_model_it_was_compiled_for():
    plan = load_plan(STORED / "plan.json")
    plan.check_model(read_model_config("tiny"))
    assert plan.mesh.dp_shard == plan.runtime_gpus == 8
    assert plan.dense_sharding == "fsdp", "what there was in 0.1.0"
    assert plan.expert_gemms == plan.dense_gemms == "compute", "what there was in 0.1.0"
    assert plan.prediction is not None and plan.prediction.peak_bytes > 0 and plan.alternatives


def test_a_checkpoint_is_whole_and_its_run_goes_on_with_the_same_losses(tmp_path):
    shutil.copytree(STORED / "run", tmp_path / "run")
    checkpoint = CheckpointStore(tmp_path / "run", keep=3).last()
    assert checkpoint is not None and checkpoint.step == 2
    verify(checkpoint)
    trainer = make_trainer(tmp_path / "run", total_steps=4, model=MODEL, **FORMATS)
    trainer.resume(checkpoint)
    assert trainer.step == 2
    trainer.train()
    expected = json.loads((STORED / "losses.json").read_text())
    assert trainer.observer.losses == pytest.approx(expected[2:], rel=1e-6)
