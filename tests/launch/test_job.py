"""What every host needs first: its own port, modules, variables and container, quoted for the shell."""

import subprocess

from dsllm.config.cluster import ClusterConfig, ContainerConfig
from dsllm.launch.job import in_container, port_of, preparation, quoted
from tests.launch.jobs import ENVIRONMENT, HOSTILE, make_job


def test_two_jobs_of_one_cluster_have_ports_of_their_own(tmp_path):
    ports = {port_of(make_job(tmp_path, f"tiny-{i}"), ClusterConfig()) for i in range(20)}
    assert len(ports) > 18 and all(20000 <= port < 30000 for port in ports)
    assert port_of(make_job(tmp_path), ClusterConfig(port=1234)) == 1234


def test_quoted_words_are_the_same_words_for_the_shell(tmp_path):
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {quoted(HOSTILE)}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert tuple(done.stdout.split("\0")[:-1]) == HOSTILE and not list(tmp_path.iterdir())


def test_variables_reach_the_command_literally(tmp_path):
    lines = preparation(ClusterConfig(environment=ENVIRONMENT, interface="ib0"))
    done = subprocess.run(["bash", "-c", "\n".join([*lines, "env -0"])], cwd=tmp_path, capture_output=True, text=True)
    variables = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    assert variables.items() >= ENVIRONMENT.items() and variables["GLOO_SOCKET_IFNAME"] == "ib0"


def test_only_apptainer_wraps_the_command():
    container = ContainerConfig(image="/x.sif", runtime="apptainer", mounts=("/data", "/a:/b"), options=("--cleanenv",))
    words = in_container(ClusterConfig(container=container))
    assert words == ["apptainer", "exec", "--nv", "--bind", "/data", "--bind", "/a:/b", "--cleanenv", "/x.sif"]
    assert not in_container(ClusterConfig())
