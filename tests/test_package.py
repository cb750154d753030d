"The front of the package: its public names, and what importing it costs."

import dataclasses
import subprocess
import sys

import pytest

import dora_nb


@pytest.mark.parametrize("name", dora_nb.__all__)
def test_a_public_name_is_there_and_documented(name):
    value = getattr(dora_nb, name)
    assert name in dir(dora_nb)
    assert name == "__version__" or value.__doc__ and value.__module__.startswith("dora_nb.")


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'dora_nb' has no attribute 'adopt'"):
        dora_nb.adopt  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, dora_nb; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "numpy"} & set(loaded)


def test_the_command_as_a_module():
    done = subprocess.run([sys.executable, "-m", "dora_nb", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == dora_nb.__version__


@pytest.mark.parametrize("name", ("AdapterConfig", "TrainConfig"))
def test_help_has_a_line_for_each_field(name):
    cls = getattr(dora_nb, name)
    lines = {line.strip().partition(": ")[0] for line in cls.__doc__.partition("Fields:")[2].splitlines()}
    assert {f.name for f in dataclasses.fields(cls)} <= lines
