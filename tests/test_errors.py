"""Errors say what to do about them."""

import json

import pytest

from dsllm.errors import MissingExtra, require


def test_a_missing_library_names_what_installs_it():
    with pytest.raises(MissingExtra, match=r"'no_such_library'.*pip install 'dsllm\[gpu\]'"):
        require("no_such_library", "gpu")
    with pytest.raises(MissingExtra, match=r"pip install 'dsllm'$"):  # a dependency of dsllm itself
        require("no_such_library")
    assert require("json") is json
