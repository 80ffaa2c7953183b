"""What a source yields: documents, and inputs that could not be read."""

from dataclasses import dataclass


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
        return f"{self.origin}: {self.reason}" + (f" ({self.detail})" if self.detail else "")
