"""The whole job in miniature: text -> tokenizer -> corpus -> training, stopped and resumed -> Hugging Face checkpoint.

Trains a small DeepSeek-V2 model (mixture of experts, latent attention) on the sources of Python's own standard library,
then opens the export with transformers, compares logits, and completes a few lines of code.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from moescale.convert.checkpoint_import import import_checkpoint
from moescale.convert.hf_config import read_model_config, resolve_model
from moescale.data.corpus import open_corpus
from moescale.errors import Preempted
from moescale.models.transformer import build_on_meta

VOCABULARY = 4096
SEQUENCE_LENGTH = 256
VALIDATION_SEQUENCES = 128
END_TOKEN = "<|end_of_text|>"
PROMPTS = ("def __init__(self", "import os\nimport ", "    for i in range(", "class TestCase(unittest.")


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def moescale(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "moescale", *map(str, arguments)]


def gather_sources(folder: Path) -> None:
    """Copy the standard library's sources, without tests and installed packages, into ``folder``."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(relative.parts):
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)


def train_tokenizer(sources: Path, model: Path) -> None:
    """A byte-level BPE, saved the way transformers loads one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(sources.rglob("*.py"))], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN).save_pretrained(model)


def write_model_folder(model: Path) -> None:
    """The ``tiny`` preset with this tokenizer's vocabulary."""
    config = json.loads((resolve_model("tiny") / "config.json").read_text())
    config |= {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    (model / "config.json").write_text(json.dumps(config, indent=2))


def train_until(step: int, command: list[str], output: Path) -> None:
    """Start the run and ask it to stop (SIGTERM) once it has done ``step`` steps; it saves before it leaves."""
    process = subprocess.Popen(command)
    metrics = output / "metrics.jsonl"
    while process.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        if sum('"loss"' in line for line in lines) >= step:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.2)
    status = process.wait()
    if status != Preempted.exit_status:
        sys.exit(f"the run left with status {status}, expected {Preempted.exit_status} (stopped, resumable)")


def check_export(export: Path) -> None:
    """Same logits from moescale and from transformers, then a few completions."""
    transformers_logging.disable_progress_bar()
    reference = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(export)
    ours = build_on_meta(read_model_config(export), torch.float32).to_empty(device="cpu")
    import_checkpoint(export, ours.config, dict(ours.named_parameters()))
    tokens = tokenizer(PROMPTS[0] + "):\n        self.name = name\n", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, actual = reference(tokens).logits, ours(tokens).logits
    error = ((actual - expected).norm() / expected.norm()).item()
    print(f"logits against transformers: relative difference {error:.1e}")
    if not error < 1e-5:
        sys.exit("the export does not compute the same function in transformers")
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        outputs = reference.generate(
            **inputs, max_new_tokens=24, do_sample=False, repetition_penalty=1.3, pad_token_id=0
        )
        print("-" * 60)
        print(tokenizer.decode(outputs[0], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    output: Path = arguments.output
    shutil.rmtree(output, ignore_errors=True)
    sources, model, corpus = output / "sources", output / "model", output / "corpus"
    run, export = output / "run", output / "export"
    model.mkdir(parents=True)
    started = time.monotonic()

    say("Standard library sources, and a byte-level BPE tokenizer trained on them")
    gather_sources(sources)
    train_tokenizer(sources, model)
    write_model_folder(model)

    say("moescale prepare: text to packed sequences, some files held out")
    options = ("--sequence-length", SEQUENCE_LENGTH, "--validation-fraction", 0.05)
    subprocess.run(
        moescale("prepare", "--source", sources, "--tokenizer", model, *options, "--output", corpus), check=True
    )

    say("moescale run: train, stop in the middle")
    held_out = open_corpus(corpus, "validation").num_sequences
    measured = min(VALIDATION_SEQUENCES, held_out)
    print(f"validation loss is measured on {measured} of {held_out} held-out sequences, evenly spaced over all of them")
    print(
        f"after about {arguments.steps // 2} steps this script asks the run to stop, as a cluster's scheduler would "
        "(SIGTERM);\nthe message 'stopped by SIGTERM' that follows is meant to come, nothing has gone wrong",
        flush=True,
    )
    command = moescale(
        *("run", "--model", model, "--data", corpus, "--output", run, "--steps", arguments.steps),
        *("--tokens-per-step", 16 * SEQUENCE_LENGTH, "--micro-batch-sequences", 16, "--learning-rate", 3e-3),
        *(
            "--warmup-steps",
            20,
            "--validation-every",
            max(1, arguments.steps // 6),
            "--validation-sequences",
            VALIDATION_SEQUENCES,
        ),
    )
    train_until(arguments.steps // 2, command, run)

    say("moescale run: the same command resumes")
    subprocess.run(command, check=True)

    say("moescale export, reopened with transformers")
    subprocess.run(moescale("export", "--run", run, "--output", export, "--dtype", "fp32"), check=True)
    check_export(export)
    say(f"done in {time.monotonic() - started:.0f} s; everything is in {output}/")


if __name__ == "__main__":
    main()
