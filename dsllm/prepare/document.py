"""What a source yields: a document, or an input that could not be read and why."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text to train on."""

    text: str
    """The text, exactly as read."""
    origin: str
    """Where it came from, for people: a file and line, a row, a module."""


@dataclass(frozen=True, slots=True)
class BadInput:
    """Something that should have been a document and could not be read."""

    origin: str
    """Where: a file, a line or row of it."""
    reason: str
    """What is wrong, in a few words that are the same for all such cases: they are counted by it."""
    detail: str = ""
    """What is special about this case."""

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}" + (f" ({self.detail})" if self.detail else "")
