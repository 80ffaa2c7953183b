"""Versions that differ between ranks are found and named, whichever rank has them; secrets are not shown."""

import dataclasses
import shutil

import pytest

from dsllm.doctor.versions import (
    NOT_INSTALLED,
    PACKAGE,
    check_versions,
    code_hash,
    driver_version,
    look_at_versions,
)
from tests.doctor.test_findings import places

OWN = look_at_versions({})


def other(**versions: str):
    """This machine's versions with some changed."""
    return dataclasses.replace(OWN, versions={**OWN.versions, **versions})


def test_ranks_that_are_alike_have_no_findings():
    assert not list(check_versions(dict.fromkeys(places("a", "a", "b"), OWN)))


@pytest.mark.parametrize("name, level", [("torch", "error"), ("deepspeed", "error"), ("python", "advice")])
def test_the_rank_with_another_version_is_named(name, level):
    a, b, c = places("a", "b", "c")
    (found,) = check_versions({a: OWN, b: other(**{name: "0.1"}), c: OWN})
    assert (found.level, found.where) == (level, "rank 1 on b")
    assert found.problem == f"{name} is 0.1, on the other ranks {OWN.versions[name]}"


def test_what_is_missing_is_named():
    (place,) = places("a")
    (found,) = check_versions({place: other(deepspeed=NOT_INSTALLED)})
    assert found.level == "error" and "deepspeed is not installed" in found.problem


def test_a_variable_set_on_one_host_only_is_reported():
    a, b = places("a", "b")
    (found,) = check_versions({a: look_at_versions({"NCCL_SOCKET_IFNAME": "ib0", "HOME": "/root"}), b: OWN})
    assert found.level == "advice" and "NCCL_SOCKET_IFNAME" in found.problem
    assert not list(
        check_versions(
            {a: look_at_versions({"CUDA_VISIBLE_DEVICES": "0"}), b: look_at_versions({"CUDA_VISIBLE_DEVICES": "1"})}
        )
    )


def test_no_secret_leaves_the_environment():
    seen = look_at_versions({"NCCL_DEBUG": "INFO", "TORCH_HUB_TOKEN": "abc", "WANDB_API_KEY": "def", "PATH": "/bin"})
    assert seen.environment == {"NCCL_DEBUG": "INFO", "TORCH_HUB_TOKEN": "(not shown)"}


def test_another_checkout_of_the_same_version_is_noticed(tmp_path):
    copy = tmp_path / "dsllm"
    shutil.copytree(PACKAGE / "doctor", copy)
    assert code_hash(copy) == code_hash(PACKAGE / "doctor")
    (copy / "clocks.py").write_text((copy / "clocks.py").read_text() + "\n")
    assert code_hash(copy) != code_hash(PACKAGE / "doctor")


def test_the_version_of_the_driver_is_read(tmp_path):
    file = tmp_path / "version"
    assert driver_version(file) == ""
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build\n",
    ):
        file.write_text(text)
        assert driver_version(file) == "535.104.05"
