"""A JSON document that ends with its own checksum: any changed byte of it is found before the content is used."""

import hashlib
import re
from typing import Literal

Seal = Literal["sound", "broken", "absent"]

_END = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\Z')
_END_BYTES = len(b',"sha256":""}') + 64


def sealed(document: bytes) -> bytes:
    """The document with the member `sha256` at its end: the SHA-256 of all bytes before that member.

    Args:
        document: a JSON object with at least one member, without white space at its end
    """
    assert document.endswith(b"}") and len(document) > len(b"{}"), "a JSON object with a member"
    content = document[:-1]
    return content + b',"sha256":"' + hashlib.sha256(content).hexdigest().encode() + b'"}'


def seal_of(document: bytes) -> Seal:
    """Whether a document ends with a checksum, and whether that is the one of its content."""
    found = _END.search(document[-_END_BYTES:])
    if found is None:
        return "absent"
    digest = hashlib.sha256(memoryview(document)[: len(document) - _END_BYTES]).hexdigest()
    return "sound" if digest.encode() == found[1] else "broken"
