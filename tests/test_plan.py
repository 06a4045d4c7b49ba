import dataclasses
import json

import pytest

from moescale.errors import ConfigError
from moescale.lora import LoraSettings
from moescale.plan import LayerPlan, MeshShape, ParallelPlan, Prediction, load_plan, one_device_plan, save_plan
from tiny import tiny_config


def plan(**overrides) -> ParallelPlan:
    fields = dict(
        model_fingerprint=tiny_config().fingerprint(),
        cluster_fingerprint="c" * 16,
        plan_gpus=4,
        runtime_gpus=8,
        mesh=MeshShape(dp_replicate=2, dp_shard=4, ep=2),
        sequence_length=128,
        tokens_per_step=128 * 2 * 3 * 8,
        micro_batch_sequences=2,
        gradient_accumulation_steps=3,
        layers=(
            LayerPlan(kind="dense", recompute="block"),
            LayerPlan(kind="moe", recompute=("experts",), reshard_after_forward=False),
        ),
        compute_dtype="bf16",
        optimizer_state_dtype="int8",
        master_weight_format="bf16_remainder",
        gradient_dtype="fp32",
        prediction=Prediction(
            step_seconds=2.0,
            tokens_per_second=3072.0,
            breakdown_seconds={"compute": 1.5},
            peak_bytes=10,
            breakdown_bytes={"weights": 10},
        ),
        alternatives=({"decision": "mesh.ep", "value": 1, "step_seconds": 2.5},),
    )
    return ParallelPlan(**(fields | overrides))


def edited(**changes) -> str:
    return json.dumps(json.loads(plan().to_json()) | changes)


def predicted(**changes) -> dict:
    return json.loads(plan().to_json())["prediction"] | changes


def test_a_plan_survives_its_file(tmp_path):
    path = tmp_path / "folder" / "plan.json"
    save_plan(plan(), path)
    assert load_plan(path) == plan()
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.json"]


def test_a_file_without_dense_sharding_is_one_of_fsdp_and_whole_weights_survive_theirs():
    old = json.loads(plan().to_json())
    del old["dense_sharding"]
    assert ParallelPlan.from_json(json.dumps(old)) == plan(dense_sharding="fsdp")
    whole = plan(
        dense_sharding="zero1",
        layers=tuple(LayerPlan(kind=kind, reshard_after_forward=False) for kind in ("sliding", "full")),
    )
    assert ParallelPlan.from_json(whole.to_json()) == whole


ONE_GPU = dict(
    plan_gpus=1, runtime_gpus=1, mesh=MeshShape(), tokens_per_step=128 * 2 * 3, expert_gemms="fp8", dense_gemms="fp8"
)


def test_a_file_without_formats_of_gemms_computes_them_in_the_compute_dtype_and_fp8_survives_its_file():
    fp8 = plan(**ONE_GPU)
    assert ParallelPlan.from_json(fp8.to_json()) == fp8
    old = json.loads(fp8.to_json())
    del old["expert_gemms"], old["dense_gemms"]
    assert ParallelPlan.from_json(json.dumps(old)) == plan(
        **ONE_GPU | dict(expert_gemms="compute", dense_gemms="compute")
    )


@pytest.mark.parametrize("name", ["expert_gemms", "dense_gemms"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(compute_dtype="fp32", master_weight_format="fp32"),
            r"plan\.{} \(fp8\) needs plan\.compute_dtype bf16, which is fp32; compile .* --precision fp8",
        ),
        (
            dict(lora=LoraSettings(rank=4, alpha=8.0, targets=("all",))),
            r"plan\.{} \(fp8\) must be compute where plan\.lora \(rank=4,.* leave out --precision fp8, or --lora",
        ),
        (
            dict(runtime_gpus=2, mesh=MeshShape(dp_replicate=2), tokens_per_step=128 * 2 * 3 * 2),
            r"plan\.{} \(fp8\) must be compute where plan\.dense_sharding is fsdp on 2 GPUs: copies .* whole w",
        ),
    ],
)
def test_gemms_in_fp8_are_those_of_trained_bf16_weights_that_a_rank_has_whole(name, changes, message):
    fields = ONE_GPU | dict(expert_gemms="compute", dense_gemms="compute") | changes
    assert plan(**fields)
    with pytest.raises(ConfigError, match=message.format(name)):
        plan(**fields | {name: "fp8"})


def test_gemms_in_fp8_run_on_several_gpus_with_whole_weights():
    mesh = dict(runtime_gpus=2, mesh=MeshShape(dp_shard=2, ep=2), plan_gpus=2, tokens_per_step=128 * 2 * 3 * 2)
    layers = tuple(dataclasses.replace(layer, reshard_after_forward=False) for layer in plan().layers)
    assert plan(**ONE_GPU | mesh, dense_sharding="zero1", layers=layers).expert_gemms == "fp8"


def test_a_file_of_format_1_has_the_kinds_dense_and_moe():
    old = json.loads(plan().to_json())
    dense, moe = ({name: value for name, value in layer.items() if name != "kind"} for layer in old.pop("layers"))
    old |= {"format": 1, "dense_layers": dense, "moe_layers": moe}
    assert ParallelPlan.from_json(json.dumps(old)) == plan()


def test_a_layer_kind_that_a_plan_does_not_name_recomputes_nothing():
    assert plan().layer("moe").recompute == ("experts",)
    assert plan().layer("sliding") == LayerPlan(kind="sliding")
    whole = plan(dense_sharding="zero1", layers=())
    assert whole.layer("sliding") == LayerPlan(kind="sliding", reshard_after_forward=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "has more than 32 objects"),
        ('{"format": "1"}', r"format \('1'\) must be 1 or 2"),
        ("[]", "must be a JSON object"),
    ],
)
def test_a_file_that_holds_no_plan_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        ParallelPlan.from_json(text)


def test_a_plan_that_cannot_be_written_names_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/plan\.json\) cannot be written: (Not a directory|File exists)"):
        save_plan(plan(), tmp_path / "file" / "plan.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan_gpus": 8}, r"plan\.plan_gpus \(8\) must be pp \* dp_shard \* cp \* tp \(1 \* 4 \* 1 \* 1 = 4\)"),
        ({"runtime_gpus": 4}, r"plan\.runtime_gpus \(4\) must be plan_gpus \* dp_replicate \(4 \* 2 = 8\)"),
        ({"tokens_per_step": 1000}, r"plan\.tokens_per_step \(1000\) must be .* = 6144\)"),
        ({"tokens_per_step": 10**18}, r"plan\.tokens_per_step \(1000.*\) must be at most 1073741824: the sequences"),
        ({"micro_batch_sequences": 0}, r"plan\.micro_batch_sequences \(0\) must be at least 1"),
        ({"mesh": {"dp_replicate": 2, "dp_shard": 4, "ep": 3}}, r"plan\.mesh\.ep \(3\) must divide dp_shard \* cp"),
        ({"mesh": {"dp_replicate": 2, "dp_shards": 4}}, r"plan\.mesh\.dp_shards is not a field.*mean 'dp_shard'"),
        ({"dense_sharding": "zero2"}, r"plan\.dense_sharding \('zero2'\) must be one of zero1, fsdp"),
        (
            {"dense_sharding": "zero1"},
            r"plan\.layers\.dense\.reshard_after_forward \(True\) must be False where plan\.dense_sharding is zero1",
        ),
        (
            {
                "dense_sharding": "zero1",
                "layers": [{"kind": "dense", "reshard_after_forward": False}, {"kind": "full"}],
            },
            r"plan\.layers\.full\.reshard_after_forward \(True\) must be False where plan\.dense_sharding is zero1",
        ),
        *(
            (
                {
                    "dense_sharding": "zero1",
                    "layers": [{"kind": "dense", "reshard_after_forward": False}],
                    "mesh": {"dp_replicate": 2, "dp_shard": 2, axis: 2},
                },
                rf"plan\.mesh\.{axis} \(2\) must be 1 where plan\.dense_sharding is zero1",
            )
            for axis in ("pp", "cp", "tp")
        ),
        ({"expert_gemms": "fp16"}, r"plan\.expert_gemms \('fp16'\) must be one of compute, fp8"),
        ({"compute_dtype": "fp16"}, r"plan\.compute_dtype \('fp16'\) must be one of bf16, fp32"),
        ({"compute_dtype": "fp32"}, r"plan\.master_weight_format \('bf16_remainder'\) must be fp32"),
        ({"optimizer_state_dtyp": "fp32"}, r"did you mean 'optimizer_state_dtype'"),
        ({"plan_gpus": "4"}, r"plan\.plan_gpus \('4'\) must be of type int"),
        ({"plan_gpus": True}, r"plan\.plan_gpus \(True\) must be of type int"),
        ({"layers": [{"kind": "dense", "recompute": "some"}]}, r"plan\.layers\[0\]\.recompute"),
        ({"layers": [{"recompute": "none"}]}, r"plan\.layers\[0\]\.kind is missing"),
        ({"layers": [{"kind": "full"}, {"kind": "full"}]}, r"plan\.layers: kind 'full' occurs 2 times; keep one"),
        ({"layers": {"full": {}}}, r"plan\.layers \(a dict\) must be of type tuple"),
        ({"format": 1}, r"plan\.dense_layers \(None\) must be an object"),
        ({"format": 1, "dense_layers": {}, "moe_layers": []}, r"plan\.moe_layers \(a list\) must be an object"),
        ({"format": True, "dense_layers": {}, "moe_layers": {}}, r"format \(True\) must be 1 or 2"),
        (
            {"layers": [{"kind": "full", "recompute": ["banana"]}]},
            r"plan\.layers\.full\.recompute \('banana'\) must be .*: experts;",
        ),
        (
            {"layers": [{"kind": "moe", "recompute": [1]}]},
            r"plan\.layers\[0\]\.recompute\[0\] \(1\) must be of type str",
        ),
        (
            {"prediction": predicted(step_seconds="2")},
            r"^plan\.prediction\.step_seconds \('2'\) must be of type float; compile it again$",
        ),
        (
            {"prediction": predicted(peak_bytes={"a": 1})},
            r"^plan\.prediction\.peak_bytes \(a dict\) must be of type int; compile it again$",
        ),
        ({"prediction": predicted(breakdown_bytes=[1])}, r"plan\.prediction\.breakdown_bytes \(a list\) must be"),
        (
            {"prediction": predicted(step_seconds=float("nan"))},
            r"plan\.prediction\.step_seconds \(nan\) must be a finite",
        ),
        ({"prediction": predicted(tokens_per_second=float("inf"))}, r"tokens_per_second \(inf\) must be a finite"),
        (
            {"prediction": predicted(peak_bytes=-1)},
            r"plan\.prediction\.peak_bytes \(-1\) must be a finite number of at",
        ),
        ({"prediction": predicted(breakdown_seconds={"a": -1})}, r"prediction\.breakdown_seconds\.a \(-1\.0\) must be"),
        ({"prediction": [1]}, r"^plan\.prediction must be an object, not list; compile it again$"),
        ({"format": 99}, r"format \(99\) must be 1 or 2"),
    ],
)
def test_a_plan_edited_into_a_contradiction_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ParallelPlan.from_json(edited(**changes))


def test_missing_fields_and_files_that_are_no_plans_are_named(tmp_path):
    document = json.loads(plan().to_json())
    del document["mesh"]
    with pytest.raises(ConfigError, match=r"plan\.mesh is missing"):
        ParallelPlan.from_json(json.dumps(document))
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match=r"plan\.json: is not JSON"):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="absent.json: missing; write a plan with `moescale compile`"):
        load_plan(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ConfigError, match=r"latin\.json: is not UTF-8 text"):
        load_plan(tmp_path / "latin.json")
    with pytest.raises(ConfigError, match="must be a JSON object, not list"):
        ParallelPlan.from_json("[]")


def test_a_plan_for_another_model_is_refused():
    plan().check_model(tiny_config())
    with pytest.raises(ConfigError, match=r"plan\.model_fingerprint .* differs from the model's"):
        plan().check_model(tiny_config(num_layers=4))
    odd = tiny_config(num_experts=7)
    with pytest.raises(ConfigError, match=r"model\.num_experts \(7\) must be divisible by plan\.mesh\.ep \(2\)"):
        dataclasses.replace(plan(), model_fingerprint=odd.fingerprint()).check_model(odd)


def test_the_one_device_plan_follows_from_its_batch():
    one = one_device_plan(
        tiny_config(), sequence_length=64, micro_batch_sequences=4, gradient_accumulation_steps=2, compute_dtype="bf16"
    )
    assert (one.tokens_per_step, one.sequences_per_step, one.runtime_gpus) == (512, 8, 1)
    one.check_model(tiny_config())
