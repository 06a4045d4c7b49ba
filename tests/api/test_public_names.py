"""What `import moescale` offers, and what it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import moescale


@pytest.mark.parametrize("name", moescale.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(moescale, name)
    assert value.__doc__ and value.__name__ == name
    assert name in dir(moescale)


def test_the_table_of_modules_has_exactly_the_public_names():
    assert set(moescale._MODULES) == set(moescale.__all__)


@pytest.mark.parametrize("name", ["prepare", "compile", "train", "export"])
def test_the_functions_are_annotated_in_full(name):
    signature = inspect.signature(getattr(moescale, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'fly'"):
        moescale.fly  # noqa: B018


def test_import_and_compile_import_no_torch():
    program = (
        "import sys, moescale;"
        "settings = moescale.CompileSettings(model='tiny', cluster='h200', sequence_length=256);"
        "print(moescale.compile(settings).plan().runtime_gpus, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]
