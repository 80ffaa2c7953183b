"""Windows of T + 1 tokens become inputs, targets one token later, and numbers of documents."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dsllm.data.validation import ValidationBatches
from dsllm.data.windows import document_numbers, inputs_and_targets
from tests.helpers.prepared import END_OF_TEXT, counting_documents, write_prepared
from tests.helpers.training_data import T, at_step, data, training


@pytest.mark.parametrize("num_windows", [1, 3])
def test_targets_are_the_inputs_one_token_later(num_windows: int) -> None:
    windows = np.arange(num_windows * 5).reshape(num_windows, 5)
    inputs, targets = inputs_and_targets(windows)
    assert inputs.tolist() == windows[:, :-1].tolist() and targets.tolist() == windows[:, 1:].tolist()
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()


def test_an_end_of_text_belongs_to_the_document_that_it_ends() -> None:
    windows = np.array([[5, 9, 9, 5, 5, 9, 5], [9, 5, 5, 5, 5, 5, 9]])
    assert document_numbers(windows, end_of_text_id=9).tolist() == [[0, 0, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1]]


def test_documents_are_numbered_in_training_and_in_validation(tmp_path: Path) -> None:
    documents = [[*words, END_OF_TEXT] for words in counting_documents(400, document_tokens=4)]
    manifest = write_prepared(tmp_path, {"a": [documents]}, {"a": [documents]})
    masked = dataclasses.replace(data(), document_mask=True)
    (batch,) = training(tmp_path, manifest, masked, micro=8).step(at_step(2))
    held_out = list(
        ValidationBatches(tmp_path, manifest, sequence_length=T, micro_batch_sequences=2, document_mask=True, stride=3)
    )
    assert len(held_out) > 50
    for found in (batch, *held_out):
        ends = (found.inputs == END_OF_TEXT).tolist()
        assert found.documents.tolist() == [[sum(row[:i]) for i in range(T)] for row in ends]
    assert batch.documents.max() > 0  # at least one sequence has two documents
    (plain,) = training(tmp_path, manifest, data(), micro=8).step(at_step(2))
    assert plain.documents is None and torch.equal(plain.inputs, batch.inputs)
