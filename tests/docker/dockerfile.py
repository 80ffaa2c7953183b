"""Reads a Dockerfile: its stages, and the instructions of each, as Docker would carry them out."""

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """One FROM and what follows it."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)
    """Instruction and its words."""

    def all(self, instruction: str) -> list[str]:
        """The words of each instruction of a kind, in order."""
        return [words for kind, words in self.instructions if kind == instruction]


def read_dockerfile(file: Path) -> list[Stage]:
    """Its stages in order."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    stages: list[Stage] = []
    for line in filter(None, (line.strip() for line in joined.splitlines())):
        instruction, _, words = line.partition(" ")
        words = " ".join(words.split())
        if instruction == "FROM":
            base, _, name = words.partition(" AS ")
            stages.append(Stage(base, name))
        else:
            stages[-1].instructions.append((instruction, words))
    return stages
