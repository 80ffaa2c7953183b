"""What a source yields: documents, inputs that could not be read, and remarks on files."""

import re
from dataclasses import dataclass

_MOST_CHARACTERS = 600  # of a detail, such as the list of a record's fields


@dataclass(frozen=True, slots=True)
class Document:
    """One text to train on."""

    text: str
    """The text, exactly as read."""
    origin: str
    """Where it came from, to show to people: a file and line, a row, a module."""


@dataclass(frozen=True, slots=True)
class BadInput:
    """An input that should have been a document but could not be read."""

    origin: str
    """A file, or a line or row in it."""
    reason: str
    """What is wrong, in the same few words for all such cases, because they are counted by reason."""
    detail: str = ""
    """More about this one case."""

    def __str__(self) -> str:
        return _sentence(self.origin, self.reason, self.detail)


@dataclass(frozen=True, slots=True)
class Remark:
    """Something that a user should know about a file, which is not an error: an empty file, bytes behind its end."""

    origin: str
    """The file."""
    kind: str
    """What there is to know, in the same few words for all such cases, because they are counted by kind."""
    detail: str = ""
    """More about this one case."""

    def __str__(self) -> str:
        return _sentence(self.origin, self.kind, self.detail)

    @property
    def place(self) -> str:
        """The file and the detail, to list next to the kind."""
        return shown(self.origin + (f" ({self.detail})" if self.detail else ""))


Item = Document | BadInput | Remark


def shown(text: object) -> str:
    """A name from elsewhere, to print: control characters and bytes that are not UTF-8 as escapes."""
    printable = str(text).encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], printable)


def _sentence(origin: str, what: str, detail: str) -> str:
    if len(detail) > _MOST_CHARACTERS:
        detail = detail[:_MOST_CHARACTERS] + " ..."
    return shown(f"{origin}: {what}" + (f" ({detail})" if detail else ""))
