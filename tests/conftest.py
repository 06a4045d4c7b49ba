"""Fixtures: a tokenizer, a model folder and a corpus made from the standard library, once per test process."""

from __future__ import annotations

import json
import os
import signal
import sysconfig
from pathlib import Path

import pytest
import torch


def _patch_the_language_once_per_launch() -> None:
    """The interpreter replaces all of triton.language at every call of a device function: two fifths of its time."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules = (interpreter.tl, interpreter.tl.core)
    seen: dict[object, frozenset[str]] = {}  # by function: which of the modules it uses
    patched: set[str] = set()

    def patch_the_rest(fn):
        if fn not in seen:
            values = fn.__globals__.values()
            seen[fn] = frozenset(m.__name__ for m in modules if any(value is m for value in values))
        if seen[fn] and seen[fn] <= patched:
            return None  # only a launch, which begins with nothing patched, uses the result
        patched.update(seen[fn])
        return patch(fn)

    def launch_with_nothing_patched(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_the_rest
    interpreter.GridExecutor.__call__ = launch_with_nothing_patched


if not torch.cuda.is_available():
    # Kernels then run in Triton's interpreter. It is asked for when a kernel is defined, so before any test runs.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    _patch_the_language_once_per_launch()
# Tests run in parallel processes: two threads of each on a busy core wait for each other, and a run of 6 s takes 70.
# Nor may bit-equality depend on the number of threads.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send and must survive.
signal.signal(signal.SIGINT, signal.default_int_handler)

END_TOKEN = "<|end_of_text|>"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run `make test-gpu` where there is one"))


@pytest.fixture(scope="session")
def stdlib_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with about 1 MB of the standard library's sources."""
    folder = tmp_path_factory.mktemp("sources")
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in ("json", "email", "http", "logging"):
        for path in sorted((library / package).glob("*.py")):
            (folder / f"{package}_{path.name}").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, stdlib_sources: Path) -> Path:
    """A Hugging Face folder without weights: a very small DeepSeek-V2 and a byte-level BPE of 512 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[END_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(path) for path in sorted(stdlib_sources.glob("json_*.py"))], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN).save_pretrained(folder)
    config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.05,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


@pytest.fixture(scope="session")
def stdlib_corpus(tmp_path_factory: pytest.TempPathFactory, stdlib_sources: Path, model_folder: Path) -> Path:
    """A fifth of the sources in sequences of 64 tokens: 1,700 for training, and 16 that a run validates with."""
    from moescale.data.prepare import prepare
    from moescale.data.prepare.settings import PrepareSettings

    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    settings = PrepareSettings(
        source=(f"{stdlib_sources}/json_*.py", f"{stdlib_sources}/logging_*.py"),
        tokenizer=str(model_folder),
        sequence_length=64,
        output=folder,
        validation_fraction=0.1,
        seed=4,  # which holds out one small file: every run of these tests reads all of it
        num_workers=1,
    )
    prepare(settings, progress=False)
    return folder
