"""Conversations that teach an answer's format, questions to test it on, and the demo's model with a chat template.

The questions are about functions and classes of Python's standard library, on whose sources the demo's model was
trained. Every answer is one line of JSON, such as {"kind": "class", "style": "CamelCase"}, that tells what the name is
and how it is written. Whole modules are held out, so that no question of the test is in a conversation.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import shutil
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
PHRASES = ("What is {name} in {module}?", "Tell me about {name} of {module}.", "Do you know {name} in {module}?")
HELD_OUT_SHARE = 0.1
NUM_QUESTIONS = 40


def definitions() -> dict[str, list[tuple[str, str]]]:
    """Return the public functions and classes of every module, each with its kind."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for module in sorted(sys.stdlib_module_names):
        path = library / f"{module}.py"
        if not path.is_file():
            path = library / module / "__init__.py"
        if module.startswith("_") or not path.is_file():
            continue
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        kinds = {ast.FunctionDef: "function", ast.AsyncFunctionDef: "function", ast.ClassDef: "class"}
        names = {node.name: kinds[type(node)] for node in nodes if type(node) in kinds and node.name[0] != "_"}
        if names:
            found[module] = list(names.items())
    return found


def style_of(name: str) -> str:
    if name.isupper():
        return "UPPERCASE"
    if name.islower():
        return "snake_case" if "_" in name else "lowercase"
    return "mixed" if "_" in name or name[0].islower() else "CamelCase"


def conversation(module: str, name: str, kind: str, chance: random.Random) -> dict[str, list[dict[str, str]]]:
    question = chance.choice(PHRASES).format(module=module, name=name)
    answer = json.dumps({"kind": kind, "style": style_of(name)})
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_lines(path: Path, records: list[dict[str, list[dict[str, str]]]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{path}: {len(records)} conversations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("demo-output/export"), help="what `make demo` leaves")
    parser.add_argument("--output", type=Path, default=Path("fine-tune"))
    arguments = parser.parse_args()
    base, output = arguments.base, arguments.output
    if not (base / "model.safetensors").is_file():
        sys.exit(f"{base} holds no weights; run `make demo` first, or name the folder of its export with --base")
    if output.exists():
        sys.exit(f"{output} exists; remove it, or name another folder with --output")
    shutil.copytree(base, output / "base")
    shutil.copyfile(HERE / "chat_template.jinja", output / "base" / "chat_template.jinja")

    chance = random.Random(0)
    modules = definitions()
    held_out = set(chance.sample(sorted(modules), int(HELD_OUT_SHARE * len(modules))))
    seen, unseen = [], []
    for module, names in modules.items():
        for name, kind in names:
            (unseen if module in held_out else seen).append(conversation(module, name, kind, chance))
    chance.shuffle(seen)
    write_lines(output / "conversations.jsonl", seen)
    write_lines(output / "questions.jsonl", chance.sample(unseen, NUM_QUESTIONS))


if __name__ == "__main__":
    main()
