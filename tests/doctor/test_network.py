"""The interfaces that gloo and NCCL will use are found by their own rules; those that cannot work are reported."""

import dataclasses
import socket

import pytest

from dsllm.doctor.network import (
    Interface,
    Network,
    check_networks,
    gloo_interface,
    look_at_network,
    nccl_interfaces,
    why_unreachable,
)
from tests.doctor.test_findings import places
from tests.doctor.test_machine import PLENTY

LO = Interface(name="lo", addresses=("127.0.0.1",), megabits=0)
ETH = Interface(name="eth0", addresses=("10.0.0.2",), megabits=1000)
NAMES = ["lo", "docker0", "eth0", "eth1", "ib0"]
GOOD = Network(interfaces=(LO, ETH), infiniband=(), gloo="eth0 10.0.0.2", nccl=("eth0",))


@pytest.mark.parametrize(
    "variable, own, expected",
    [
        ("", ["10.0.0.2"], "eth0 10.0.0.2"),
        ("", ["127.0.1.1"], "lo 127.0.1.1"),  # Debian's /etc/hosts
        ("", ["10.9.9.9", "10.0.0.2"], "eth0 10.0.0.2"),
        ("", [], "lo 127.0.0.1"),
        ("eth0", ["127.0.0.1"], "eth0 10.0.0.2"),
        ("eth7", ["10.0.0.2"], ""),
    ],
)
def test_gloo_takes_the_variable_then_the_host_s_name_then_the_loopback(variable, own, expected):
    found, problem = gloo_interface((LO, ETH), variable, own)
    assert found == expected and bool(problem) == (variable == "eth7" or not own)


@pytest.mark.parametrize(
    "variable, expected",
    [
        ("", ("ib0",)),
        ("eth", ("eth0", "eth1")),
        ("=eth0", ("eth0",)),
        ("^eth,docker", ("lo", "ib0")),
        ("^=eth0", ("lo", "docker0", "eth1", "ib0")),
        ("bond", ()),
    ],
)
def test_nccl_takes_prefixes_or_whole_names_or_all_but_those(variable, expected):
    assert nccl_interfaces(NAMES, variable) == expected
    assert nccl_interfaces(["lo", "docker0"], "") == ("docker0",) and nccl_interfaces(["lo"], "") == ("lo",)


def test_this_host_has_an_interface_for_both():
    seen = look_at_network({})
    assert seen.gloo and seen.nccl and not seen.problem
    assert look_at_network({"GLOO_SOCKET_IFNAME": "nosuch0"}).problem
    assert "NCCL_SOCKET_IFNAME=nosuch" in look_at_network({"NCCL_SOCKET_IFNAME": "nosuch"}).problem


def judge(*networks, hosts="ab", device="cpu"):
    seen = dict(zip(places(*hosts), networks, strict=True))
    return list(check_networks(seen, dict.fromkeys(seen, PLENTY), device))


def test_a_loopback_is_no_way_to_another_host():
    lost = dataclasses.replace(GOOD, gloo="lo 127.0.1.1")
    (found,) = judge(GOOD, lost)
    assert found.level == "error" and found.where == "b" and "GLOO_SOCKET_IFNAME" in found.action
    assert not judge(lost, hosts="a") and not judge(GOOD, GOOD)


def test_an_interface_that_is_not_there_is_an_error_even_on_one_host():
    (found,) = judge(dataclasses.replace(GOOD, gloo="", problem="no such interface"), hosts="a")
    assert found.level == "error"


def test_infiniband_on_some_hosts_only_is_found():
    fast = dataclasses.replace(GOOD, infiniband=("mlx5_0",))
    (found,) = judge(fast, GOOD)
    assert found.level == "error" and found.where == "rank 1 on b"
    assert not judge(fast, fast)


def test_why_the_master_is_not_reached():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert why_unreachable("127.0.0.1", port) == ""
    assert "nothing listens" in why_unreachable("127.0.0.1", port)
    assert why_unreachable("no-such-host.invalid", port)
