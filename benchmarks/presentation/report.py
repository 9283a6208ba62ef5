"""``shardline bench report [FOLDER]``: the newest result of each benchmark in a folder, on one page.

``python -m benchmarks.presentation.report [runs/benchmarks]`` writes ``FOLDER/report.md`` from the tables and
plots beside the raw files.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.presentation.result_files import kind_of, read_header, results_in
from sharding.ranks.errors import UserError, ends_with_a_sentence

_HEADING = re.compile(r"^#", re.MULTILINE)


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Write the page and say where; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline bench report")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/benchmarks"), metavar="FOLDER")
    folder = parser.parse_args(arguments).folder
    newest = newest_results(folder)
    if not newest:
        raise UserError(f"{folder} holds no results; measure something first: shardline bench all --quick, say.")
    page = folder / "report.md"
    page.write_text(render(newest))
    print(f"{len(newest)} results: {page}")
    return 0


def newest_results(folder: Path) -> list[Path]:
    """The newest raw file of each name and kind of machine that has a table beside it, by name."""
    newest: dict[str, Path] = {}
    for raw in sorted(results_in(folder), key=lambda path: read_header(path).get("time", "")):
        if raw.with_suffix(".md").exists():
            newest[kind_of(raw)] = raw
    return [newest[kind] for kind in sorted(newest)]


def render(results: Sequence[Path]) -> str:
    """The page as Markdown.

    Args:
        results: raw files with their tables, and plots where there are some, beside them.
    """
    sections = ["# Benchmarks"]
    for raw in results:
        sections.append(_HEADING.sub("##", raw.with_suffix(".md").read_text().strip()))
        sections += [
            f"![{raw.stem}]({raw.parent.name}/{raw.stem}{ending})"
            for ending in (".svg", ".png")
            if _is_beside(raw, ending)
        ]
    return "\n\n".join(sections) + "\n"


def _is_beside(raw: Path, ending: str) -> bool:
    return raw.with_suffix(ending).exists()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
