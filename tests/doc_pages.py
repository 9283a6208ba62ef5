"""What is between the fences of a page: commands, and files that a reader copies."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import ROOT


@dataclass
class Page:
    """A page's code blocks.

    Attributes:
        path: of the page.
        blocks: language and text of each.
        files: those that begin with their own name in a comment, by it.
    """

    path: Path
    blocks: list[tuple[str, str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Page":
        """Find the blocks between fences."""
        found = re.findall(r"^```([a-z]*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
        page = cls(path, found)
        for language, text in found:
            if language != "text" and (name := re.match(r"# ([\w.-]+\.(?:yaml|py))\n", text)):
                page.files[name[1]] = text
        return page

    def commands(self, language: str = "sh") -> list[list[str]]:
        """Words of each command, in order: those to type, or with ``console`` those that were typed in a session."""
        found = []
        for text in (text for tag, text in self.blocks if tag == language):
            lines = re.sub(r"\\\n\s*", " ", text).splitlines()
            if language == "console":
                lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            for part in (part for line in lines for part in re.split(r" && | \| |; ", line)):
                if words := shlex.split(part, comments=True):
                    found.append([words[0].removeprefix(".venv/bin/"), *words[1:]])
        return found

    def configurations(self, folder: Path) -> dict[str, Path]:
        """Where a configuration is that the page names: its own, written into a folder, and the examples."""
        for name, text in self.files.items():
            (folder / name).write_text(text)
        examples = {f"configs/{path.name}": path for path in (ROOT / "configs").glob("*.yaml")}
        return examples | {name: folder / name for name in self.files if name.endswith(".yaml")}
