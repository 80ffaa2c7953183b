"""The layout of a job: its data-parallel ranks and its hosts."""

import pytest

from dsllm.engine.settings.layout import Layout, ranks_by_node
from dsllm.errors import LaunchError
from dsllm.mesh import Mesh


def layout_of(*ranks: int, mesh: Mesh | None = None) -> Layout:
    """A job with so many ranks on each host."""
    return Layout(mesh=mesh or Mesh(data=sum(ranks)), device="cpu", precision="fp32", ranks_by_node=ranks)


def test_one_host_is_the_default():
    layout = Layout(mesh=Mesh(data=3), device="cpu", precision="fp32")
    assert (layout.num_nodes, layout.ranks_per_node) == (1, 3)


def test_hosts_that_are_equal_and_hosts_that_differ():
    assert (layout_of(4, 4).num_nodes, layout_of(4, 4).ranks_per_node) == (2, 4)
    assert (layout_of(4, 2).num_nodes, layout_of(4, 2).ranks_per_node) == (2, None)


def test_only_the_data_axis_divides_the_batch():
    assert layout_of(4, 4, mesh=Mesh(data=2, tensor=4)).data_size == 2


def test_the_hosts_must_have_the_ranks_of_the_mesh():
    with pytest.raises(AssertionError, match="the mesh has 8"):
        layout_of(4, 2, mesh=Mesh(data=8))


def test_every_rank_finds_the_same_hosts_from_what_all_ranks_report():
    """Slots 4 and 2: judged from its own host alone, one host would count two hosts and the other three."""
    reported = [(0, 4), (1, 4), (2, 4), (3, 4), (0, 2), (1, 2)]
    assert ranks_by_node(reported) == (4, 2)
    assert ranks_by_node([(0, 1)]) == (1,)


@pytest.mark.parametrize(
    "reported",
    [
        [(0, 4), (1, 4), (2, 4), (3, 4), (0, 4), (1, 4)],  # six ranks, but hosts of four
        [(0, 2), (1, 2), (0, 2), (0, 2)],
        [(1, 2), (1, 2)],
        [(0, 16)] * 16,
        [(0, 2), (1, 3), (0, 2), (1, 1)],
    ],
    ids=str,
)
def test_reports_that_do_not_fit_together_are_refused(reported):
    with pytest.raises(LaunchError, match=f"the {len(reported)} ranks do not divide into hosts"):
        ranks_by_node(reported)


def test_ranks_that_are_dealt_out_over_the_hosts():
    """As srun --distribution=cyclic numbers them."""
    assert ranks_by_node([(0, 2), (0, 1), (1, 2)]) == (2, 1)


def test_hosts_that_are_not_known_yet():
    layout = Layout(mesh=Mesh(data=6), device="cuda", precision="bf16", ranks_by_node=None)
    assert (layout.num_nodes, layout.ranks_per_node) == (None, None)
