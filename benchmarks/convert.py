"""Peak host memory and time of importing and exporting a synthetic checkpoint of a few GB in several shards.

    python benchmarks/convert.py --output benchmarks/results/cpu/convert.json

The export reads the checkpoint of a run that the import leaves. Each direction runs in a process of its own, whose peak
resident memory (file pages it maps included) is taken by the kernel and compared with the promise: import within the
model and two shards, export within two shards, over what the process holds before it starts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moescale.config import ModelConfig
from moescale.convert.checkpoint_export import export_checkpoint
from moescale.convert.checkpoint_import import import_checkpoint
from moescale.convert.hf_config import read_model_config
from moescale.convert.key_table import build_key_table
from moescale.models.transformer import build_on_meta, named_weights
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.checkpoint_weights import WEIGHTS_PREFIX, CheckpointWeights
from moescale.runtime.checkpoint_writer import CheckpointWriter
from moescale.tools.measurement import describe_measurement, write_result

SHARD_BYTES = 400_000_000
CHANGES = {
    "num_hidden_layers": 5,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "moe_intermediate_size": 1408,
    "vocab_size": 32768,
}


def write_checkpoint(folder: Path) -> int:
    """A DeepSeek-V2-Lite cut in depth and width, random bf16 weights, in shards; returns the bytes of its weights."""
    preset = json.loads((Path(__file__).parents[1] / "moescale/presets/deepseek-v2-lite/config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(preset | CHANGES))
    pieces = [piece for group in build_key_table(read_model_config(folder)).values() for piece in group]
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for piece in pieces:
        if sum(tensor.nbytes for tensor in shards[-1].values()) > SHARD_BYTES - 100_000_000:
            write_shard(folder, len(shards), shards[-1])
            shards[-1] = {key: tensor[:0] for key, tensor in shards[-1].items()}
            shards.append({})
        shards[-1][piece.key] = torch.randn(piece.shape, generator=generator).bfloat16()
    write_shard(folder, len(shards), shards[-1])
    weight_map = {key: shard_name(number) for number, shard in enumerate(shards, start=1) for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def shard_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / shard_name(number), metadata={"format": "pt"})


def measure_import(folder: Path, saved: Path) -> dict[str, float]:
    config = read_model_config(folder)
    model = build_on_meta(config, torch.bfloat16).to_empty(device="cpu")
    before, started = start_of_peak(), time.perf_counter()
    import_checkpoint(folder, config, named_weights(model))
    figures = {"seconds": time.perf_counter() - started, "peak_over_start_bytes": resident_bytes("VmHWM") - before}
    weights = {f"{WEIGHTS_PREFIX}{name}": weight.detach() for name, weight in named_weights(model).items()}
    CheckpointWriter(CheckpointStore(saved, keep=1)).save(1, {}, weights)
    return figures


def measure_export(folder: Path, saved: Path, output: Path) -> dict[str, float]:
    config: ModelConfig = read_model_config(folder)
    before, started = start_of_peak(), time.perf_counter()
    with CheckpointWeights(CheckpointStore(saved, keep=1).at(1)) as source:
        export_checkpoint(
            config, source, output, reference=folder, dtype=torch.bfloat16, max_shard_bytes=SHARD_BYTES - 50_000_000
        )
    return {"seconds": time.perf_counter() - started, "peak_over_start_bytes": resident_bytes("VmHWM") - before}


def start_of_peak() -> int:
    """Reset the kernel's record of this process's peak resident memory; return what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def resident_bytes(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                content = file.get_tensor(key).contiguous().view(torch.uint8).numpy().tobytes()
                found[key] = hashlib.sha256(content).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        stage, *paths = arguments.stage
        figures = {"import": measure_import, "export": measure_export}[stage](*map(Path, paths))
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model_bytes = write_checkpoint(work / "hf")
        shard_bytes = max(path.stat().st_size for path in (work / "hf").glob("*.safetensors"))
        result = describe_measurement("safetensors") | {
            "model_bytes": model_bytes,
            "num_shards": len(list((work / "hf").glob("*.safetensors"))),
            "largest_shard_bytes": shard_bytes,
            "import": run_stage("import", work / "hf", work / "saved"),
            "export": run_stage("export", work / "hf", work / "saved", work / "out"),
            "largest_exported_shard_bytes": max(path.stat().st_size for path in (work / "out").glob("*.safetensors")),
            "bit_identical": digests(work / "hf") == digests(work / "out"),
        }
    result["import"]["allowed_bytes"] = model_bytes + 2 * shard_bytes
    result["export"]["allowed_bytes"] = 2 * result["largest_exported_shard_bytes"]
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_result(arguments.output, result)


def run_stage(stage: str, *paths: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--stage", stage, *map(str, paths)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
