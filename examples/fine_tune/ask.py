"""Ask models the held-out questions, with transformers and the chat template of their folder.

    python examples/fine_tune/ask.py fine-tune/base fine-tune/merged

A folder with adapter_config.json is opened by PEFT, on the weights that it names.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

FORMAT = {
    "kind": ("function", "class"),
    "style": ("UPPERCASE", "snake_case", "lowercase", "mixed", "CamelCase"),
}
NUM_SHOWN = 3
MOST_NEW_TOKENS = 48


def open_model(folder: Path) -> Any:
    """Return the model in ``folder``, or that of the adapters in it."""
    if not folder.is_dir():
        sys.exit(f"{folder} is not a folder")
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    from peft import PeftModel

    base = json.loads(adapter.read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)


def answers(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """Return what the model answers, greedily, each question alone."""
    found = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(
            **inputs, max_new_tokens=MOST_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        found.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def parsed(answer: str) -> dict[str, str] | None:
    """Return an answer in the format that was taught, None for any other."""
    try:
        value = json.loads(answer)
    except ValueError:
        return None
    if not isinstance(value, dict) or list(value) != list(FORMAT):
        return None
    return value if all(value[name] in FORMAT[name] for name in FORMAT) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--questions", type=Path, default=Path("fine-tune/questions.jsonl"))
    parser.add_argument("--tokenizer", type=Path, default=Path("fine-tune/base"), help="of folders of adapters")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    # PEFT 0.19 asks transformers 5 by the old name; nothing that a reader of this example could change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    records = [json.loads(line)["messages"] for line in arguments.questions.read_text().splitlines()]
    questions = [question["content"] for question, _ in records]
    expected = [json.loads(answer["content"]) for _, answer in records]
    for folder in arguments.model:
        has_tokenizer = (folder / "tokenizer.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder if has_tokenizer else arguments.tokenizer)
        found = answers(open_model(folder), tokenizer, questions)
        print(f"\n=== {folder}")
        for question, answer in list(zip(questions, found, strict=True))[:NUM_SHOWN]:
            print(f"{question}\n    {' '.join(answer.split())}")
        forms = [parsed(answer) for answer in found]
        in_format = sum(form is not None for form in forms) / len(forms)
        exact = sum(form == right for form, right in zip(forms, expected, strict=True))
        print(f"in the format: {in_format:.0%} of {len(forms)} held-out answers; right: {exact / len(forms):.0%}")


if __name__ == "__main__":
    main()
