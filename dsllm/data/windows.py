"""Turns windows of token ids into inputs, targets (one token later) and document numbers."""

# Shapes: B sequences of a micro-batch, T tokens of a sequence.

import numpy as np
import torch


def inputs_and_targets(windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 [B, T], of windows, int64 [B, T + 1].

    numpy makes the copies: torch would copy a large window with a team of threads, and the thread that reads ahead
    would get a team of its own, which competes with the model for the cores.
    """
    return _tensor(windows[:, :-1]), _tensor(windows[:, 1:])


def document_numbers(windows: np.ndarray, end_of_text_id: int) -> torch.Tensor:
    """The number of the document that each input belongs to, from 0 in each window; int64 [B, T] for windows [B, T + 1].

    It is the count of end-of-text tokens before the input: an end-of-text belongs to the document that it ends.
    """
    ends = windows[:, :-1] == end_of_text_id
    return torch.from_numpy(np.cumsum(ends, 1) - ends)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
