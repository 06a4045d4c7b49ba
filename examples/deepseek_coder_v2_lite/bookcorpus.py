"""Prepare BookCorpus, or any other text, for DeepSeek-Coder-V2-Lite: the reference document's command line on moescale.

    python bookcorpus.py --data_path_or_name bookcorpus/bookcorpus \\
        --tokenizer_path_or_name deepseek-ai/DeepSeek-Coder-V2-Lite-Base \\
        --save_path ./bookcorpus_2k --sequence_length 2048

The first four flags are the reference's; the others set what it hard-codes. Everything is done by ``moescale prepare``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moescale.data.prepare import PrepareSettings, prepare
from moescale.errors import MoescaleError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path_or_name", required=True, help="dataset's hub name, file or folder")
    parser.add_argument("--tokenizer_path_or_name", required=True, help="model's hub name, folder or tokenizer.json")
    parser.add_argument("--save_path", type=Path, required=True, help="folder to write, for train.py --dataset_path")
    parser.add_argument("--sequence_length", type=int, required=True, help="tokens per sequence")
    parser.add_argument("--text_column", default="text", help="column that holds the text")
    parser.add_argument("--split", default="train", help="split of the dataset")
    parser.add_argument("--validation_fraction", type=float, default=0.0, help="share of documents held out")
    parser.add_argument("--document_boundaries", action="store_true", help="attention does not cross documents")
    parser.add_argument("--end_token", help="token that closes a document; default: the tokenizer's own")
    parser.add_argument("--num_workers", type=int, help="processes; default: one per core")
    return parser.parse_args()


def main() -> None:
    flags = parse()
    try:
        report = prepare(
            PrepareSettings(
                source=flags.data_path_or_name,
                tokenizer=flags.tokenizer_path_or_name,
                sequence_length=flags.sequence_length,
                output=flags.save_path,
                text_column=flags.text_column,
                split=flags.split,
                validation_fraction=flags.validation_fraction,
                document_boundaries=flags.document_boundaries,
                end_token=flags.end_token,
                num_workers=flags.num_workers,
            )
        )
    except MoescaleError as error:
        raise SystemExit(f"bookcorpus.py: {error}") from None
    print(report.to_text())


if __name__ == "__main__":
    main()
