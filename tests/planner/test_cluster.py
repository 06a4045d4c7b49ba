from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from pathlib import Path

import pytest

from moescale.errors import ConfigError
from moescale.planner.cluster import SHIPPED, Cluster, Rates, load_cluster, parse_cluster
from moescale.planner.explain import explain_text
from moescale.planner.request import PlanRequest
from moescale.planner.search import compile_plan
from tiny import tiny_config

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NAMES = ("a100-80", "b200", "h100-sxm", "h200")


def document() -> dict:
    return tomllib.loads((SHIPPED / "h100-sxm.toml").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_a_shipped_file_says_where_it_is_from(name: str) -> None:
    cluster = load_cluster(name)
    described = {field.name for field in dataclasses.fields(Cluster)} - {"name", "gpu", "gpus_per_node", "sources"}
    defaults = {field.name: field.default for field in dataclasses.fields(Cluster)}
    described -= {name for name, default in defaults.items() if getattr(cluster, name) == default}
    assert set(cluster.sources) == described
    assert all(
        source.startswith(("data sheet", "measured", "derived", "assumed")) for source in cluster.sources.values()
    )


def test_there_are_no_other_shipped_files() -> None:
    assert sorted(path.stem for path in SHIPPED.glob("*.toml")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_kernel_is_faster_than_the_data_sheet(name: str) -> None:
    cluster = load_cluster(name)
    for rates in (cluster.dense_gemm, cluster.grouped_gemm, cluster.attention):
        assert max(rates.flops_per_second) < cluster.peak_flops_per_second
    for in_fp8 in (cluster.fp8_dense_gemm, cluster.fp8_grouped_gemm):
        assert in_fp8 is None or max(in_fp8.flops_per_second) < 2 * cluster.peak_flops_per_second


def test_only_gpus_with_fp8_have_rates_of_it() -> None:
    with_fp8 = {name for name in NAMES if load_cluster(name).fp8_grouped_gemm is not None}
    assert with_fp8 == {name for name in NAMES if load_cluster(name).fp8_dense_gemm is not None}
    assert with_fp8 == {"h100-sxm", "h200"}


def test_rates_of_experts_in_fp8_on_an_h100_are_those_measured_and_a_read_of_the_gradients_buffers() -> None:
    rows = json.loads((RESULTS / "h100" / "fp8_experts.json").read_text())["rows"]
    cluster = load_cluster("h100-sxm")
    rates = cluster.fp8_grouped_gemm
    assert rates is not None
    for tokens in (4096, 8192, 16384):
        (row,) = [
            row
            for row in rows
            if row["scope"] == "mlp" and row["tokens"] == tokens and row["form"] == "fp8, transposed in passes"
        ]
        flops = 18 * tokens * 6 * 2048 * 1408
        read = 64 * 3 * 2048 * 1408 * 2 / cluster.memory_bytes_per_second
        seconds = (row["forward_ms"] + row["backward_ms"]) / 1e3 + read
        assert rates.at(tokens * 6 / 64) == pytest.approx(flops / seconds, rel=1e-3)


def test_rates_are_linear_in_the_logarithm_and_constant_outside() -> None:
    rates = Rates(sizes=(10.0, 1000.0), flops_per_second=(1.0, 3.0))
    assert [rates.at(size) for size in (1, 10, 1000, 1e6)] == [1.0, 1.0, 3.0, 3.0]
    assert rates.at(100) == pytest.approx(2.0)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"cluster 'h100-smx' is not known; .*did you mean 'h100-sxm'"):
        load_cluster("h100-smx")


def test_the_beginning_of_a_name_leads_to_the_name_and_not_to_one_spelt_alike() -> None:
    with pytest.raises(ConfigError, match=r"cluster 'h100' is not known; .*did you mean 'h100-sxm'"):
        load_cluster("h100")


def test_a_file_that_is_not_there_or_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.toml: missing"):
        load_cluster(str(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_cluster(str(tmp_path / "bad.toml"))
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match="latin.toml: is not UTF-8 text"):
        load_cluster(str(tmp_path / "latin.toml"))


def test_a_name_with_brackets_is_printed_as_it_is() -> None:
    cluster = dataclasses.replace(load_cluster("h200"), gpu="[/bold] :smile: GPU")
    request = PlanRequest(runtime_gpus=1, tokens_per_step=256, sequence_length=256)
    for limited in (request, dataclasses.replace(request, memory_limit_bytes=100)):
        assert "[/bold] :smile: GPU" in explain_text(compile_plan(tiny_config(), cluster, limited))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_byte": 1}, "memory_byte is not a field of a cluster file.*memory_bytes"),
        ({"memory_bytes": -1}, r"memory_bytes \(-1\) must be positive"),
        ({"memory_bytes": "80 GB"}, r"memory_bytes \('80 GB'\) must be of type int"),
        ({"sustained_clock": 1.5}, r"sustained_clock \(1.5\) must be above 0 and at most 1"),
        ({"sustained_clock": 0.33}, r"sustained_clock \(0.33\) must be at least 0.6: power and heat .* measure again"),
        (
            {"grouped_gemm": {"sizes": [1.0], "flops_per_second": [1.2e15]}},
            r"grouped_gemm.flops_per_second \(1.2e\+15\) must not exceed peak_flops_per_second \(9.89e\+14\)",
        ),
        (
            {"fp8_dense_gemm": {"sizes": [1.0], "flops_per_second": [2.2e15]}},
            r"fp8_dense_gemm.flops_per_second \(2.2e\+15\) must not exceed 2 times peak_flops_per_second \(9.89e",
        ),
        ({"fp8_grouped_gemm": {"sizes": [1.0], "flops_per_second": []}}, "fp8_grouped_gemm needs as many"),
        ({"allocator_slack": 4.0}, r"allocator_slack \(4.0\) must be at most 0.5"),
        ({"exchange": {"latency_seconds": 1e-6, "bytes_per_second": 0}}, "exchange.bytes_per_second .* must be pos"),
        ({"attention": {"sizes": [1.0], "flops_per_second": []}}, "attention needs as many"),
        ({"attention": {"sizes": [2.0, 1.0], "flops_per_second": [1.0, 1.0]}}, "attention.sizes must increase"),
        ({"attention": {"sizes": [1.0], "flops_per_second": [0.0]}}, "attention.flops_per_second must be positive"),
        (
            {"attention": {"sizes": [0, 1.0], "flops_per_second": [1.0, 1.0]}},
            r"attention.sizes \(0.0\) must be positive",
        ),
        ({"dense_gemm": {"sizes": [-1.0], "flops_per_second": [1.0]}}, r"dense_gemm.sizes \(-1.0\) must be positive"),
        (
            {"attention": {"sizes": [1.0], "flops_per_second": [math.nan]}},
            r"attention.flops_per_second.0. \(nan\) must be",
        ),
        (
            {"attention": {"sizes": [math.inf], "flops_per_second": [1.0]}},
            r"attention.sizes.0. \(inf\) must be a",
        ),
        ({"launch_seconds": math.nan}, r"launch_seconds \(nan\) must be a finite number"),
        (
            {"peak_flops_per_second": 10**400},
            r"peak_flops_per_second \(an integer of 1329 bits\) must be a finite number",
        ),
        ({"memory_bytes": math.inf}, r"memory_bytes \(inf\) must be of type int"),
        ({"host": {"latency_seconds": 1e-6, "bytes_per_second": math.inf}}, r"host.bytes_per_second \(inf\) must be"),
        ({"host": {"latency_seconds": math.nan, "bytes_per_second": 1}}, r"host.latency_seconds \(nan\) must be"),
        ({"host": {"latency_seconds": -1, "bytes_per_second": 1}}, r"host.latency_seconds \(-1.0\) must not be"),
        ({"host": {"latency_seconds": 1e-6}}, "host.bytes_per_second is missing"),
        ({"host": {"latency_seconds": 1e-6, "bytes_per_second": 0}}, "host.bytes_per_second .* must be positive"),
    ],
)
def test_a_wrong_figure_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"my.toml: {message}"):
        parse_cluster(document() | change, "my.toml")


def test_a_file_without_the_exchange_reads_peers_at_the_rate_of_the_link_in_a_node() -> None:
    without = document()
    del without["exchange"]
    cluster = parse_cluster(without, "my.toml")
    assert cluster.peer_reads == cluster.intra_node
    assert parse_cluster(document(), "my.toml").peer_reads.bytes_per_second == 341e9


def test_a_missing_field_is_named() -> None:
    incomplete = document()
    del incomplete["launch_seconds"]
    with pytest.raises(ConfigError, match="launch_seconds is missing"):
        parse_cluster(incomplete, "my.toml")


def test_the_fingerprint_follows_the_figures_and_not_their_sources() -> None:
    cluster = load_cluster("h200")
    assert dataclasses.replace(cluster, sources={}).fingerprint() == cluster.fingerprint()
    assert dataclasses.replace(cluster, fp8_dense_gemm=None).fingerprint() == cluster.fingerprint()
    assert dataclasses.replace(cluster, launch_seconds=1e-6).fingerprint() != cluster.fingerprint()


def test_files_from_before_a_field_mean_its_default_and_keep_their_fingerprint() -> None:
    old = parse_cluster(document(), "my.toml")
    written = parse_cluster(document() | {"margin_bytes": 2 * 2**30, "host_layer_seconds": 0.01}, "my.toml")
    assert old.fingerprint() == written.fingerprint() == "46af1e5b949c4cba", "as plans in use name it"
    assert parse_cluster(document() | {"margin_bytes": 2**30}, "my.toml").fingerprint() != old.fingerprint()
    with pytest.raises(ConfigError, match=r"nccl_bytes \(-1\) must be positive"):
        parse_cluster(document() | {"nccl_bytes": -1}, "my.toml")


def test_what_several_gpus_take_beyond_their_tensors_is_the_clusters() -> None:
    request = PlanRequest(
        runtime_gpus=2, plan_gpus=2, tokens_per_step=4096, sequence_length=256, pins={"dense_sharding": "fsdp"}
    )

    def best(**fields: float):
        cluster = parse_cluster(document() | fields, "my.toml")
        result = compile_plan(tiny_config(), cluster, request, with_alternatives=False)
        assert result.best is not None
        return result, result.best

    (result, plan), (lean, small) = best(), best(nccl_bytes=0, margin_bytes=0)
    assert plan.memory.breakdown["NCCL"] == 2**30 and small.memory.breakdown["NCCL"] == 0
    assert lean.limit_bytes - result.limit_bytes == 2 * 2**30
    _, quick = best(host_layer_seconds=0.0, host_sharding_seconds=0.0, host_exchange_seconds=0.0)
    assert quick.time.exposed["host launches"] == 0 < plan.time.exposed["host launches"]
    _, slow = best(host_sharding_seconds=1.0)
    steps = slow.candidate.gradient_accumulation_steps
    assert slow.time.exposed["host launches"] == pytest.approx(steps * tiny_config().num_layers, rel=0.1)
