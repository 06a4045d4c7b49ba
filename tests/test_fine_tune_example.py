"""The commands of examples/fine_tune/README.md, word for word: the model answers in the format that it was taught."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "examples" / "fine_tune" / "README.md"
SHARE = re.compile(r"=== fine-tune/(\w+)\n(?:.*\n)*?in the format: (\d+)% of 40 held-out answers")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_readme_teaches_the_format(tmp_path):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    demo = [sys.executable, "examples/demo.py"]
    subprocess.run(demo, cwd=tmp_path, env=environment, check=True, capture_output=True)
    printed = ""
    for block in re.findall(r"```\n(.*?)```", README.read_text(), re.DOTALL):
        for command in block.splitlines():
            done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            printed += done.stdout
    shares = {name: int(share) for name, share in SHARE.findall(printed)}
    assert shares.keys() == {"base", "merged", "adapter", "whole"}
    assert shares["base"] == 0
    assert shares["merged"] == shares["adapter"]
    assert min(shares["merged"], shares["whole"]) >= 70
