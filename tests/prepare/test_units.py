"""A unit contains the documents that were added to it, and its checksum identifies them."""

import hashlib
from pathlib import Path

import pytest

from dsllm.errors import DataError
from dsllm.prepare.units import Unit, UnitCutter, spool_path, spooled_documents

DOCUMENTS = [b"one", b"", b"\x00\xff" * 50, "zwölf\n".encode(), b"five"]


def cut(folder: Path, documents: list[bytes], unit_bytes: int, source: str = "s") -> list[Unit]:
    folder.mkdir(exist_ok=True)
    cutter = UnitCutter(folder, source, "train", unit_bytes)
    units = [cutter.add(content, hashlib.sha256(content).digest()) for content in documents]
    return [unit for unit in [*units, cutter.finish()] if unit is not None]


def test_documents_of_any_bytes_are_read_back_in_order(tmp_path: Path):
    (unit,) = cut(tmp_path, DOCUMENTS, 10**6)
    assert list(spooled_documents(unit.spool)) == DOCUMENTS
    assert (unit.num_documents, unit.text_bytes) == (5, sum(map(len, DOCUMENTS)))
    assert unit.spool == spool_path(tmp_path, unit.name)


def test_a_unit_is_complete_as_soon_as_it_has_enough_text(tmp_path: Path):
    units = cut(tmp_path, DOCUMENTS, 100)
    assert [unit.num_documents for unit in units] == [3, 2]
    assert [unit.name for unit in units] == ["train-s-00000", "train-s-00001"]
    assert [content for unit in units for content in spooled_documents(unit.spool)] == DOCUMENTS
    assert [unit.num_documents for unit in cut(tmp_path, DOCUMENTS, 103)] == [3, 2]  # exactly enough: none is left over
    assert cut(tmp_path, [], 1) == []


def test_the_checksum_depends_on_the_documents_and_their_order_only(tmp_path: Path):
    def checksum(documents: list[bytes], source: str = "s") -> str:
        return cut(tmp_path, documents, 10**6, source)[0].documents_sha256

    assert checksum(DOCUMENTS) == checksum(DOCUMENTS, "another")
    others = [DOCUMENTS[::-1], DOCUMENTS[:-1], [*DOCUMENTS[:-1], b"six"], [b"".join(DOCUMENTS)]]
    assert len({checksum(documents) for documents in [DOCUMENTS, *others]}) == 5


def test_a_spool_file_that_has_changed_is_refused(tmp_path: Path):
    """Every truncation, and every length with any of its bits flipped."""
    (unit,) = cut(tmp_path, DOCUMENTS, 10**6)
    whole = unit.spool.read_bytes()
    ends = {8 * n + sum(map(len, DOCUMENTS[:n])) for n in range(len(DOCUMENTS) + 1)}
    for length in set(range(len(whole))) - ends:
        unit.spool.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"train-s-00000\.spool: changed while it waited"):
            list(spooled_documents(unit.spool))
    for bit in range(64):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        unit.spool.write_bytes(content)
        try:
            assert list(spooled_documents(unit.spool)) != DOCUMENTS
        except DataError:
            continue
