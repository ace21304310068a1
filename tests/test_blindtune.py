"""The public names: few, sorted, documented, and there without loading what isn't used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import blindtune


def test_names_are_few_and_each_has_a_home():
    homes = [name for names in blindtune._HOMES.values() for name in names]
    assert sorted(homes) == sorted(blindtune.__all__)
    assert len(set(homes)) == len(homes) <= 30


@pytest.mark.parametrize("name", blindtune.__all__)
def test_every_name_is_there_and_documented(name: str):
    assert getattr(blindtune, name).__doc__


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="P4EFT"):
        blindtune.P4EFT  # noqa: B018


def test_importing_the_package_loads_neither_torch_nor_transformers():
    program = "import sys, blindtune, blindtune.cli; print(*(m for m in ('torch', 'transformers') if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
