"""The wheel and the source distribution hold everything, and what is installed from the wheel works without sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The tracked files alone, in a folder of their own: nothing that was left in the working tree has a part in it."""
    folder = tmp_path_factory.mktemp("sources")
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(sources: Path, kind: str) -> Path:
    """Build a distribution by the back end that pyproject.toml names."""
    program = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    output = sources.parent / f"dist-{sources.name}-{kind}"
    output.mkdir()
    subprocess.run([sys.executable, "-c", program, output], cwd=sources, capture_output=True, check=True)
    return next(output.iterdir())


@pytest.fixture(scope="module")
def wheel(sources) -> Path:
    return build(sources, "wheel")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The Python of a new environment that has the wheel, and finds its dependencies where these tests do."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, home=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A folder on the path; .pth files in it, such as that of an editable installation, are not followed.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def run(*command: object, home: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HOME": str(home), "SHELL": "/bin/bash"}
    done = subprocess.run(list(map(str, command)), cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_the_package_alone_with_its_data_types_and_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert {name.partition("/")[0] for name in names} == {"moescale", info}
    assert {"moescale/py.typed", "moescale/planner/clusters/h200.toml", f"{info}/licenses/LICENSE"} <= set(names)
    assert metadata.get_all("Classifier") == PROJECT["classifiers"]
    assert metadata["Description-Content-Type"] == "text/markdown" and "moescale prepare" in metadata.get_payload()
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])


def test_a_wheel_built_from_the_source_distribution_is_the_same(sources, wheel, tmp_path):
    with tarfile.open(build(sources, "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    with zipfile.ZipFile(build(unpacked, "wheel")) as rebuilt, zipfile.ZipFile(wheel) as direct:
        assert sorted(rebuilt.namelist()) == sorted(direct.namelist())


@pytest.mark.parametrize("start", ["module", "script"])
def test_the_installed_command_plans_without_the_sources(installed, tmp_path, start):
    command = (installed, "-m", "moescale") if start == "module" else (installed.parent / "moescale",)
    plan = run(*command, "compile", "--model", "tiny", "--cluster", "h200", "--sequence-length", "256", home=tmp_path)
    assert "tokens/s" in plan
    where = run(installed, "-c", "import moescale; print(moescale.__file__)", home=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parents[1])


def test_completion_is_installed_for_the_shell(installed, tmp_path):
    run(installed.parent / "moescale", "--install-completion", home=tmp_path)
    typed = "COMP_WORDS=(moescale cal); COMP_CWORD=1; _moescale; echo ${COMPREPLY[@]}"
    shown = run("bash", "-c", f"source ~/.bashrc; {typed}; complete -p moescale", home=tmp_path)
    assert shown.split()[:2] == ["calibrate", "complete"]
