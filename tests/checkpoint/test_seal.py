"""The checksum at the end of a document finds every changed byte, and the document stays JSON."""

import json
import random

from dsllm.checkpoint.seal import seal_of, sealed

DOCUMENT = json.dumps({"format_version": 3, "words": ["", "]}", "ü"], "nested": {"sha256": "0" * 64}}).encode()


def test_a_sealed_document_is_the_same_json_with_its_checksum():
    found = json.loads(sealed(DOCUMENT))
    assert len(found.pop("sha256")) == 64 and found == json.loads(DOCUMENT)
    assert seal_of(sealed(DOCUMENT)) == "sound" and seal_of(DOCUMENT) == "absent"


def test_every_single_flipped_bit_is_found():
    """All of them: 8 for each byte of the document."""
    whole = sealed(DOCUMENT)
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        assert seal_of(bytes(damaged)) != "sound"


def test_cut_and_extended_documents_are_found():
    whole, source = sealed(DOCUMENT), random.Random(5)
    for _ in range(200):
        cut = source.randrange(len(whole))
        assert seal_of(whole[:cut]) != "sound" and seal_of(whole[cut + 1 :]) != "sound"
    assert seal_of(whole + b"\n") != "sound" and seal_of(b"") == "absent"
