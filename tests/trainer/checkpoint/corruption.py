"""Corruption of files, as disks, copies and people do it."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from trainer.files.checked_json import SUM_KEY, dump_checked, load_checked

Draw = Callable[[st.SearchStrategy[Any]], Any]
Corruption = Callable[[Draw, list[Path]], None]


def _pick(draw: Draw, files: list[Path]) -> Path:
    return draw(st.sampled_from(files))


def _position(draw: Draw, length: int) -> int:
    """Anywhere, and often at the beginning, where headers are."""
    return draw(st.one_of(st.integers(0, max(0, length - 1)), st.integers(0, max(0, min(length, 64) - 1))))


def flip(draw: Draw, files: list[Path]) -> None:
    file = _pick(draw, files)
    contents = bytearray(file.read_bytes())
    for _ in range(draw(st.integers(1, 3))):
        if contents:
            contents[_position(draw, len(contents))] ^= 1 << draw(st.integers(0, 7))
    file.write_bytes(contents)


def truncate(draw: Draw, files: list[Path]) -> None:
    file = _pick(draw, files)
    contents = file.read_bytes()
    file.write_bytes(contents[: _position(draw, len(contents))])


def insert(draw: Draw, files: list[Path]) -> None:
    file = _pick(draw, files)
    contents = file.read_bytes()
    at = _position(draw, len(contents) + 1)
    file.write_bytes(contents[:at] + draw(st.binary(min_size=1, max_size=20)) + contents[at:])


def cut_out(draw: Draw, files: list[Path]) -> None:
    file = _pick(draw, files)
    contents = file.read_bytes()
    at = _position(draw, len(contents))
    file.write_bytes(contents[:at] + contents[at + draw(st.integers(1, 600)) :])


def zero_block(draw: Draw, files: list[Path]) -> None:
    file = _pick(draw, files)
    contents = bytearray(file.read_bytes())
    at = _position(draw, len(contents))
    size = min(draw(st.sampled_from([1, 8, 512, 4096])), len(contents) - at)
    contents[at : at + size] = bytes(size)
    file.write_bytes(contents)


def swap(draw: Draw, files: list[Path]) -> None:
    first, second = _pick(draw, files), _pick(draw, files)
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)


def duplicate(draw: Draw, files: list[Path]) -> None:
    source, target = _pick(draw, files), _pick(draw, files)
    target.write_bytes(source.read_bytes())


def remove(draw: Draw, files: list[Path]) -> None:
    _pick(draw, files).unlink()


def make_folder(draw: Draw, files: list[Path]) -> None:
    file = _pick(draw, files)
    file.unlink()
    file.mkdir()


def huge_header(draw: Draw, files: list[Path]) -> None:
    """The length of a safetensors header, or the first bytes of another file."""
    file = _pick(draw, files)
    length = draw(st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([2**63, 2**64 - 1, 100_000_001, 1 << 40])))
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.sampled_from(["../x", "/etc/passwd", "float32", "complex64", "__class__", "manifest.json", "\0"]),
)


def edit_json(draw: Draw, files: list[Path]) -> None:
    """Another value, a missing one or one more, somewhere in a JSON file; the checksum stays as it was."""
    file = _pick(draw, [file for file in files if file.suffix == ".json"])
    values = json.loads(file.read_bytes())
    _edit(draw, values)
    file.write_text(json.dumps(values))


def edit_and_seal(draw: Draw, manifest: Path, sections: tuple[str, ...]) -> None:
    """The same in some sections of a manifest, with a checksum that fits again."""
    values = load_checked(manifest.read_bytes())
    _edit(draw, values, sections)
    values.pop(SUM_KEY, None)
    manifest.write_bytes(dump_checked(values))


def _edit(draw: Draw, values: Any, keys: tuple[str, ...] | None = None) -> None:
    key = draw(st.sampled_from(sorted(values) if keys is None else keys))
    while isinstance(values[key], dict | list) and values[key] and draw(st.integers(0, 9)):
        values = values[key]
        key = (
            draw(st.sampled_from(sorted(values))) if isinstance(values, dict) else draw(st.integers(0, len(values) - 1))
        )
    match draw(st.sampled_from(["replace", "nudge", "remove", "add"])):
        case "nudge" if isinstance(values[key], int):
            values[key] += draw(st.sampled_from([-1, 1, 2**31, 2**63]))
        case "remove":
            del values[key]
        case "add" if isinstance(values, list):
            values.append(values[key])
        case _:
            values[key] = draw(_VALUES)


EVERYWHERE: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        flip,
        truncate,
        insert,
        cut_out,
        zero_block,
        swap,
        duplicate,
        remove,
        make_folder,
        huge_header,
        edit_json,
    )
}


def fresh_copy(source: Path, target: Path) -> Path:
    """A folder anew, whatever was done to the copy before."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


class Tally:
    """What became of the cases, by kind of corruption."""

    def __init__(self) -> None:
        self._outcomes: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, outcome: str) -> None:
        self._outcomes[kind, outcome] += 1

    def summary(self) -> dict[str, Any]:
        by_outcome: Counter[str] = Counter()
        by_kind: dict[str, dict[str, int]] = {}
        for (kind, outcome), count in sorted(self._outcomes.items()):
            by_outcome[outcome] += count
            by_kind.setdefault(kind, {})[outcome] = count
        return {"num_cases": by_outcome.total(), "outcomes": dict(by_outcome), "by_kind": by_kind}
