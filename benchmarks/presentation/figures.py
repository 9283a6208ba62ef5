"""Every figure of a page is that of a file: tables are made of it, numbers in sentences are compared with it.

``python -m benchmarks.presentation.figures [--write] [PAGE ...]`` checks README.md and docs/, or writes them again
after a new measurement. docs/figures.md says how a page names a figure.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.presentation.not_measured import NOT_MEASURED
from benchmarks.presentation.page_tables import page_plot, page_table
from benchmarks.presentation.result_files import RESULTS
from benchmarks.presentation.result_tables import NUMBER, FigureError, agrees, field_of, numbers_of, rounded

ROOT = Path(__file__).resolve().parents[2]
_GENERATED = ("configuration.md",)
_TABLE = re.compile(r"<!-- figures: (?P<what>[^>]*?) -->\n(?P<table>.*?)<!-- figures end -->", re.DOTALL)
_REFERENCE = re.compile(r"\[(?P<text>[^\[\]]+)\]\[(?P<label>[\w .-]+)\]", re.DOTALL)
_DEFINITION = re.compile(r'^\[(?P<label>[\w .-]+)\]: (?P<path>\S+) "(?P<field>[^"]+)"$', re.MULTILINE)
_UNIT = (
    r"(?:ms|us|s|min|h|[KMGT]i?B(?:/s)?|%|(?:million )?tokens/s|requests/s|requests a second|nats|points)"
    r"(?![\w/-])"
)
# With a unit, with thousands, or with digits behind the point; no version, and no part of a name.
_MEASURED = re.compile(
    r"(?<![\w.`#/-])(?:"
    rf"\d[\d,]*(?:\.\d+)?(?= {_UNIT})|\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|"
    r"\d+\.\d\d+(?![\d.]*\.\d)|\d+\.\d(?= times))(?!\w)"
)
# Versions, and how sure an interval is.
_NEVER_MEASURED = re.compile(
    r"(?:Python|torch|transformers|DeepSpeed) \d+(?:\.\d+)+|95 % (?:interval|bootstrap interval)|\(95 %\)"
)
_CLAIM = re.compile(r"\b(?P<word>faster|slower)\b")
_CLAIMING = ("README.md", "benchmarks.md")


def main(arguments: Sequence[str]) -> int:
    """Check or write pages; returns 1 where one says what its files do not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.presentation.figures")
    parser.add_argument("--write", action="store_true", help="write tables and numbers as the files have them")
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="default: README.md and docs/")
    options = parser.parse_args(arguments)
    complaints = []
    for page in options.pages or pages():
        text = page.read_text()
        if options.write:
            write_plots(text)
            text = rewritten(text, page.parent)
            page.write_text(text)
        complaints += [f"{page}: {complaint}" for complaint in check(text, page)]
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def pages() -> list[Path]:
    """README.md and the pages of docs/ but those that are made of the code."""
    return [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name not in _GENERATED)]


def check(text: str, page: Path, allowed: Sequence[str] | None = None) -> list[str]:
    """What is wrong with the figures of a page, a sentence each.

    Args:
        text: the page.
        page: where it lies, for its links.
        allowed: phrases with numbers that nobody has measured; those of ``NOT_MEASURED`` if not given.
    """
    allowed = NOT_MEASURED.get(page.name, ()) if allowed is None else allowed
    complaints = [f"line {_line(text, at)}: {said}" for at, said in _wrong(text, page.parent)]
    bare = _without_references(text)
    bare = _NEVER_MEASURED.sub(_blank, bare)
    for phrase in allowed:
        if phrase not in bare:
            complaints.append(f"{phrase!r} in not_measured.py stands there no more")
        bare = bare.replace(phrase, " " * len(phrase))
    found = list(_MEASURED.finditer(bare))
    if page.name in _CLAIMING:
        found += _CLAIM.finditer(bare)
    for number in sorted(found, key=lambda match: match.start()):
        start = bare.rfind("\n", 0, number.start()) + 1
        around = text[start : text.find("\n", start)]
        complaints.append(
            f"line {_line(bare, number.start())}: {number[0]!r} names no file and field: {around.strip()}"
        )
    return complaints


def write_plots(text: str) -> None:
    """Draw the plots of a page that do not show what they should."""
    for table in _TABLE.finditer(_without_fences(text)):
        with suppress(FigureError):
            if (plot := page_plot(table["what"])) and not _has_its_plot(table["what"]):
                plot[0].write_text(plot[1])


def rewritten(text: str, folder: Path) -> str:
    """A page with tables and numbers as the files have them; what names nothing stays, for ``check`` to tell.

    Args:
        text: the page.
        folder: where it lies.
    """
    for found in reversed(list(_TABLE.finditer(_without_fences(text)))):
        with suppress(FigureError):
            text = text[: found.start()] + _with_table(found, folder) + text[found.end() :]
    definitions = _definitions(text)

    for found in reversed(list(_REFERENCE.finditer(_without_code(text)))):
        # What is written in minutes and seconds stays: check says where it no longer holds.
        if found["label"] not in definitions or " min " in found["text"]:
            continue
        try:
            measured, is_share = _measured(folder, *definitions[found["label"]], found["text"])
        except FigureError:
            continue
        for number, value in reversed(list(zip(NUMBER.finditer(found["text"]), measured, strict=False))):
            new = rounded(value, number[0], is_share=is_share)
            start = found.start("text")
            text = text[: start + number.start()] + new + text[start + number.end() :]
    return text


def results_named(text: str, folder: Path) -> set[Path]:
    """The files that a page's figures, plots, links and sentences name.

    Args:
        text: the page.
        folder: where it lies.
    """
    linked = [match["path"] for match in _DEFINITION.finditer(text)] + re.findall(r"\]\(([^)#\s]+)", text)
    found = {(folder / path).resolve() for path in linked if "://" not in path}
    found |= {RESULTS / word for word in re.findall(r"\d{4}-\d\d-\d\d_\d+x[a-z]+/[\w.-]*\w", text)}
    return {path for path in found if path.is_relative_to(RESULTS)}


def _wrong(text: str, folder: Path) -> Iterator[tuple[int, str]]:
    """Where a page differs from its files, and how."""
    for found in _TABLE.finditer(_without_fences(text)):
        try:
            is_right = _with_table(found, folder) == found[0] and _has_its_plot(found["what"])
        except FigureError as error:
            yield found.start(), f"{found['what']}: {error}"
            continue
        if not is_right:
            yield found.start(), f"the table of {found['what']} is another; --write writes it"
    definitions = _definitions(text)
    used = set()
    for found in _REFERENCE.finditer(_without_code(text)):
        if found["label"] not in definitions:
            yield found.start(), f"[{found['label']}] is not defined"
            continue
        used.add(found["label"])
        try:
            _compare(found["text"], folder, *definitions[found["label"]])
        except FigureError as error:
            yield found.start(), f"[{found['label']}]: {error}"
    for label in sorted(set(definitions) - used):
        yield 0, f"[{label}] is defined and not used"


def _compare(shown: str, folder: Path, path: str, field: str) -> None:
    measured, is_share = _measured(folder, path, field, shown)
    if claim := _CLAIM.search(shown):
        if len(measured) < 3 or not (float(measured[2]) < 1 if claim["word"] == "faster" else float(measured[1]) > 1):
            raise FigureError(f"{claim['word']} is said where {path} has {' '.join(measured)}")
        return
    numbers = numbers_of(shown)
    if not numbers or len(numbers) > len(measured):
        raise FigureError(f"{shown!r} has {len(numbers)} numbers, and {path} {len(measured)} under {field}")
    for number, value in zip(numbers, measured, strict=False):
        if not agrees(number, value, is_share=is_share):
            raise FigureError(f"{number} is {value} in {path} under {field}")


def _measured(folder: Path, path: str, field: str, shown: str) -> tuple[list[str], bool]:
    """The numbers of a field, and whether they are shares of 1 that the page writes in percent."""
    file = folder / path
    if not file.is_file():
        raise FigureError(f"there is no {path}")
    text = field_of(file, field)
    numbers = numbers_of(text)
    # An interval alone stands for itself.
    if re.match(r"\S+ to ", shown) and len(numbers) > 2:
        numbers = numbers[1:]
    is_in_percent = re.match(r"[^\d\n]*[\d.,]+ ?%", text) is not None
    return numbers, ("%" in shown or "points" in shown) and not is_in_percent


def _has_its_plot(what: str) -> bool:
    """Whether a plot shows the values that it should; other versions of its library draw the same otherwise."""
    plot = page_plot(what)
    return plot is None or (plot[0].is_file() and plot[0].read_text().splitlines()[-1:] == plot[1].splitlines()[-1:])


def _with_table(found: re.Match[str], folder: Path) -> str:
    lines = page_table(found["what"], folder)
    return f"<!-- figures: {found['what']} -->\n\n" + "\n".join(lines) + "\n\n<!-- figures end -->"


def _definitions(text: str) -> dict[str, tuple[str, str]]:
    found = _DEFINITION.finditer(_without_fences(text))
    return {match["label"]: (match["path"], match["field"]) for match in found}


def _without_references(text: str) -> str:
    """The page with blanks in place of code, of tables that are made and of what names a figure; lines stay."""
    text = _without_code(_DEFINITION.sub(_blank, _TABLE.sub(_blank, text)))
    for pattern in (_REFERENCE, re.compile(r"\]\([^)]*\)")):
        text = pattern.sub(_blank, text)
    return text


def _without_code(text: str) -> str:
    """The page with blanks in place of code, as long as it is."""
    return re.sub(r"`[^`\n]*`", _blank, _without_fences(text))


def _without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", _blank, text, flags=re.DOTALL | re.MULTILINE)


def _blank(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
