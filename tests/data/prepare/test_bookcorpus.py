"""The reference document's data command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from moescale.data.corpus import open_corpus

SCRIPT = Path(__file__).parents[3] / "examples" / "deepseek_coder_v2_lite" / "bookcorpus.py"


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_the_reference_flags_prepare_a_corpus(lines_file, model_folder, tmp_path):
    flags = ("--data_path_or_name", lines_file, "--tokenizer_path_or_name", model_folder)
    result = run(*flags, "--save_path", tmp_path / "books_2k", "--sequence_length", 32)
    assert result.returncode == 0, result.stderr
    assert "60 documents" in result.stdout
    corpus = open_corpus(tmp_path / "books_2k")
    assert corpus.sequence_length == 32 and not corpus.document_boundaries


def test_errors_come_without_a_traceback(model_folder, tmp_path):
    flags = ("--data_path_or_name", tmp_path / "absent", "--tokenizer_path_or_name", model_folder)
    result = run(*flags, "--save_path", tmp_path / "books_2k", "--sequence_length", 32)
    assert result.returncode == 1
    assert "absent' does not exist" in result.stderr and "Traceback" not in result.stderr
