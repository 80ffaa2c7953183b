"""Boxes and flat regions, against plain indexing."""

import torch

from dsllm.slices import Box, Region, whole


def test_a_region_is_a_flat_range_of_a_box():
    parameter = torch.arange(24.0).view(4, 6)
    box = Box((1, 2), (4, 5))
    assert box.shape == (3, 3) and box.num_elements == 9
    assert torch.equal(Region(box, 2, 7).of(parameter), parameter[1:4, 2:5].flatten()[2:7])
    assert len(Region(box, 2, 7)) == 5


def test_a_region_of_the_whole_parameter_is_a_view():
    parameter = torch.zeros(3, 4)
    Region(whole((3, 4)), 5, 7).of(parameter).fill_(1.0)
    assert parameter.flatten().nonzero().flatten().tolist() == [5, 6]


def test_a_scalar_has_one_element():
    assert whole(()).num_elements == 1 and Region(whole(()), 0, 1).of(torch.tensor(3.0)).tolist() == [3.0]
