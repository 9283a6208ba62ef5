"""Table and plot of ``shardline bench memory``, from its raw rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measure.comparison import Series
from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Bar, bars

TARGET = 0.05
"""Largest difference of a measured state from its formula, as a share of the formula."""

_MIB = 2**20
_LEAST_SHOWN = 0.05 * _MIB
_NUM_PIECES = 3
# Names of measured uses and of the formula's terms.
_TERMS = (
    ("masters", "masters"),
    ("gathered", "gathered"),
    ("gradients", "gradients"),
    ("moments", "moments"),
    ("other", "in_flight"),
)
Row = Mapping[str, Any]


def series(rows: Sequence[Row]) -> dict[str, Series]:
    """Peaks in bytes, of each rank, by case."""
    found = {}
    for case, ranks in _cases(rows).items():
        for moment in ("peak", "batch peak"):
            found[f"{case} {moment}"] = Series([_total(row["moments"][moment]) for row in ranks])
    return found


def markdown(rows: Sequence[Row], file: str, changes: Sequence[str] = ()) -> str:
    """The result as Markdown.

    Args:
        rows: what the raw file holds.
        file: name of the raw file.
        changes: lines about the result before this one.
    """
    header = rows[0]
    config, cases = header["config"], _cases(rows)
    lines = [*facts(header, "Memory of each rank, beside the formula"), "", _describe(header), ""]
    if not cases:
        return "\n".join([*lines, "Nothing was measured."]) + "\n"
    lines += _states(cases)
    lines += ["", *_verdicts(cases), "", *_moments(cases), "", *_batches(cases, config), ""]
    if changes:
        lines += [*changes, ""]
    return "\n".join([*lines, f"Raw numbers: `{file}`."]) + "\n"


def plot(rows: Sequence[Row]) -> str:
    """Measured states as bars, with the formula's number beside each, as SVG."""
    found = []
    for case, ranks in _cases(rows).items():
        totals = [_total(row["moments"]["peak"]) / _MIB for row in ranks]
        formula = _formula_total(ranks[0]) / _MIB
        found.append(Bar(case, max(totals), min(totals), max(totals), f"formula {formula:,.0f}"))
    return bars(found, "MiB of the largest rank")


def _describe(header: Row) -> str:
    config = header["config"]
    model, batch = config["model"]["config"], config["batch"]
    steps = batch["global_size"] // (batch["micro_size"] * header["num_ranks"])
    return (
        f"{header['num_ranks']} ranks; {config['model']['architecture']}, {model.get('num_hidden_layers')} blocks of "
        f"width {model.get('hidden_size')}; {steps} micro-batches a step, optimizer {config['optimizer']['name']}, "
        f"precision {config['precision']['compute']}. Bytes of tensors, in MiB, of the rank that holds most."
    )


def _states(cases: Mapping[str, list[Row]]) -> list[str]:
    lines = [
        "The state at its peak, measured / formula:",
        "",
        *_head("case", "masters", "gathered", "gradients", "moments", "in flight", "sum", "measured / formula"),
    ]
    for case, ranks in cases.items():
        row = _largest(ranks, "peak")
        measured, formula = row["moments"]["peak"], row["formula"]["state"]
        cells = [f"{measured[use] / _MIB:.1f} / {formula[term] / _MIB:.1f}" for use, term in _TERMS]
        total, expected = _total(measured), _formula_total(row)
        cells += [f"{total / _MIB:.1f} / {expected / _MIB:.1f}", f"{total / expected:.3f}"]
        lines.append(_row([case, *cells]))
    return lines


def _verdicts(cases: Mapping[str, list[Row]]) -> list[str]:
    ours = {case: ranks for case, ranks in cases.items() if not case.startswith("deepspeed")}
    ratios = {case: _ratio(_largest(ranks, "peak")) for case, ranks in ours.items()}
    missed = [f"{case} ({ratio - 1:+.1%})" for case, ratio in ratios.items() if abs(ratio - 1) > TARGET]
    met = [case for case, ratio in ratios.items() if abs(ratio - 1) <= TARGET]
    parts = [f"Within {TARGET:.0%} of the formula: {', '.join(met) or 'none'}."]
    if missed:
        parts.append(f"Not: {', '.join(missed)}.")
    return [" ".join(parts)]


def _moments(cases: Mapping[str, list[Row]]) -> list[str]:
    lines = [
        "Bytes at moments of a step on next to no tokens; what is kept between steps; the largest pieces in flight at "
        "the peak; and the largest copy that a collective makes for itself, which is in no sum:",
        "",
        *_head("case", "between steps", "after backward", "peak", "kept", "in flight", "collective"),
    ]
    for case, ranks in cases.items():
        row = _largest(ranks, "peak")
        moments = row["moments"]
        kept = [f"{use} {value / _MIB:.1f}" for use, value in moments["rest"].items() if value >= _LEAST_SHOWN]
        pieces = [f"{num} x {size / _MIB:.1f}" for size, num in row["unnamed_at_peak"] if size >= _LEAST_SHOWN]
        cells = [f"{_total(moments[name]) / _MIB:.1f}" for name in ("rest", "backward done", "peak")]
        lines.append(
            _row([case, *cells, ", ".join(kept), ", ".join(pieces[:_NUM_PIECES]), f"{row['transport'] / _MIB:.1f}"])
        )
    return lines


def _batches(cases: Mapping[str, list[Row]], config: Row) -> list[str]:
    num_tokens = config["batch"]["micro_size"] * config["data"]["sequence_length"]
    lines = [
        f"With micro-batches of {num_tokens:,} tokens; activations are what those add to the peak:",
        "",
        *_head("case", "peak", "activations", "at least, by the formula"),
    ]
    for case, ranks in cases.items():
        row = _largest(ranks, "batch peak")
        peak, state = _total(row["moments"]["batch peak"]), _total(row["moments"]["peak"])
        cells = (peak, peak - state, row["formula"]["activations"])
        lines.append(_row([case, *(f"{cell / _MIB:.1f}" for cell in cells)]))
    return lines


def _cases(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of all ranks, by case, in the order in which cases were measured."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "case":
            found.setdefault(row["case"], []).append(row)
    return {case: sorted(ranks, key=lambda row: row["rank"]) for case, ranks in found.items()}


def _largest(ranks: Sequence[Row], moment: str) -> Row:
    return max(ranks, key=lambda row: _total(row["moments"][moment]))


def _total(uses: Mapping[str, int]) -> int:
    return sum(uses.values())


def _formula_total(row: Row) -> float:
    return sum(row["formula"]["state"].values())


def _ratio(row: Row) -> float:
    return _total(row["moments"]["peak"]) / _formula_total(row)


def _head(*names: str) -> list[str]:
    return [_row(names), _row(["---"] * len(names))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
