"""Sizes with units, paths with ``~``, and names that are a path or a repository: one rule each, for every setting."""

import dataclasses
import re
import socket
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from moescale import cli
from moescale.api.compile_settings import CompileSettings
from moescale.api.export import ExportSettings
from moescale.api.train_request import RunInputs
from moescale.convert.hf_config import resolve_model
from moescale.data.prepare.settings import PrepareSettings
from moescale.data.prepare.tokenizer import load_tokenizer
from moescale.errors import ConfigError, DataError, MoescaleError, nearest
from moescale.hub import looks_like_path
from moescale.runtime.settings import TrainSettings
from moescale.user_values import parse_size

SETTINGS = (PrepareSettings, CompileSettings, RunInputs, TrainSettings, ExportSettings)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64", 64 * 2**30),
        ("64GB", 64e9),
        ("64 GiB", 64 * 2**30),
        ("64gib", 64 * 2**30),
        ("1.5TB", 1.5e12),
        ("512mib", 2**29),
        ("1e3KB", 1e6),
        ("100b", 100),
    ],
)
def test_a_size_has_a_unit_or_the_settings_own(text, size):
    assert parse_size(text, setting="memory_limit", unit="GiB") == size


@pytest.mark.parametrize("text", ["", "GB", "64XB", "-1GB", "nan", "1e999", "64 GB x", "0x10"])
def test_what_is_not_a_size_is_refused_with_the_units(text):
    with pytest.raises(ConfigError, match=r"memory_limit \(.*\) must be a finite number of GiB, or a size with a unit"):
        parse_size(text, setting="memory_limit", unit="GiB")


def fields_of(settings):
    hints = get_type_hints(settings)
    return [(field.name, hints[field.name], field) for field in dataclasses.fields(settings)]


def test_every_setting_that_is_a_size_takes_units():
    found = {
        name.replace("_", "-")
        for settings in SETTINGS
        for name, _, _ in fields_of(settings)
        if re.search("bytes|memory|size$", name)
    }
    assert found == cli._SIZES.keys()


def test_every_text_setting_that_takes_a_path_is_expanded():
    """By its docstring: whoever adds a text that may be a path finds its name missing here."""
    found = set()
    for settings in SETTINGS:
        source = Path(__import__(settings.__module__, fromlist=["x"]).__file__).read_text()
        for name, hint, _ in fields_of(settings):
            described = re.search(rf'\n    {name}: [^\n]*\n    """([^"]*)"""', source)
            is_text = hint is str or str in get_args(hint)
            if is_text and described and re.search(r"\bfolders?\b|\(\.toml\)", described[1], re.IGNORECASE):
                found.add(name)
    not_paths = {"initialize", "include", "exclude"}  # a choice; patterns of names below a folder
    assert found - not_paths == cli._PATHS_OR_NAMES


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Runs a command up to its settings, and returns them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    calls = []

    def run(*arguments):
        command, bound, _ = cli.app.parse_args([str(argument) for argument in arguments], exit_on_error=False)
        calls.append(bound)
        return bound.arguments

    def parse(settings, *arguments):
        document = tmp_path / "settings.toml"
        document.write_text(settings)
        values = cli.read_toml(document, cli._SETTINGS)
        cli.app.config = (cli.Dict(values, source=str(document), use_commands_as_keys=True), *cli._RULES)
        return run(*arguments)

    yield parse
    cli.app.config = ()


def test_a_tilde_in_a_settings_file_is_the_home_folder_everywhere(recorded, tmp_path):
    settings = recorded(
        '[prepare]\nsource = ["~/a", "b"]\ntokenizer = "~/tok"\noutput = "~/corpus"\nsequence_length = 8\n', "prepare"
    )["settings"]
    assert (settings.source, settings.tokenizer) == ((str(tmp_path / "a"), "b"), str(tmp_path / "tok"))
    assert settings.output == tmp_path / "corpus"
    inputs = recorded('[run]\nmodel = "~/m"\ndata = "~/d"\noutput = "~/o"\nplan = "~/p.json"\n', "run")["inputs"]
    assert (inputs.model, inputs.data) == (str(tmp_path / "m"), tmp_path / "d")
    assert (inputs.output, inputs.plan) == (tmp_path / "o", tmp_path / "p.json")
    settings = recorded('[compile]\nmodel = "tiny"\ncluster = "~/c.toml"\n', "compile", "--output", "~/x")["settings"]
    assert (settings.cluster, settings.output) == (str(tmp_path / "c.toml"), tmp_path / "x")


def test_sizes_take_units_in_settings_files_and_options(recorded):
    settings = recorded('[compile]\nmodel = "tiny"\nmemory_limit = "64GB"\n', "compile")["settings"]
    assert settings.memory_limit == 64e9 / 2**30
    assert recorded("", "compile", "--model", "tiny", "--memory-limit=64")["settings"].memory_limit == 64
    given = ("--run", "r", "--output", "o", "--max-shard-gigabytes", "2GiB")
    assert recorded("", "export", *given)["settings"].max_shard_gigabytes == 2**31 / 1e9
    given = ("--source", "a", "--tokenizer", "t", "--output", "o", "--sequence-length", "8")
    settings = recorded('[prepare]\nmemory_gigabytes = "1.5TB"\n', "prepare", *given)["settings"]
    assert settings.memory_gigabytes == 1500
    with pytest.raises(
        ConfigError, match=r"settings.toml: compile.memory_limit \(64XB\) must be a finite number of GiB"
    ):
        recorded('[compile]\nmodel = "tiny"\nmemory_limit = "64XB"\n', "compile")


@pytest.mark.parametrize(
    "name", ["./a", "../a/b", "/a/b", "~/a", "a/b/c", "a/", "here/absent", "tokenizer.json", "a b"]
)
def test_what_looks_like_a_path_is_never_looked_up(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up"))
    assert looks_like_path(name)
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(name)
    with pytest.raises(ConfigError, match=f"model '{re.escape(name)}' does not exist"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "deepseek-ai/DeepSeek-V2.5"])
def test_a_hub_that_does_not_answer_is_said_at_once(name, tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    began = time.monotonic()
    with pytest.raises(DataError, match=f"tokenizer '{name}' does not exist: .* fetching it from the hub failed"):
        load_tokenizer(name)
    if "/" in name:
        with pytest.raises(ConfigError, match=f"model '{name}' does not exist: .* has no such folder, and fetching it"):
            resolve_model(name)
    assert time.monotonic() - began < 15  # five retries took 23 seconds


@pytest.mark.parametrize(
    ("name", "meant"),
    [("modle", "model"), ("./modle", "model"), ("runs/frist", "runs/first"), ("nowhere/x/model", None)],
)
def test_a_folder_that_does_not_exist_is_called_so_with_the_one_spelt_like_it(name, meant, tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    for folder in ("model", "runs/first"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    said = f"did you mean '{meant}'" if meant else "the folder nowhere/x does not exist either"
    for read in (load_tokenizer, resolve_model):
        with pytest.raises(MoescaleError, match="does not exist|is neither a folder") as caught:
            read(name)
        assert said in str(caught.value)


def test_the_nearest_name_is_found_in_any_case() -> None:
    assert nearest("FP8", ("compute", "fp8")) == "; did you mean 'fp8'?"
    assert nearest("h100", ("H100-SXM", "h200")) == "; did you mean 'H100-SXM'?"
    assert nearest("zzz", ("compute", "fp8")) == ""
