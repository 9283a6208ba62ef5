"""What ``python -m benchmarks.device`` has found, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.device.job import PASSED
from benchmarks.device.rungs import RUNGS

_GIB = 2**30
Part = Mapping[str, Any]


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result, as ``device.json`` has it."""
    header, parts = result["header"], {part["name"]: part for part in result["parts"]}
    lines = ["# A device", "", *_facts(header), "", *_ends(result["parts"])]
    for name, describe in (
        ("machine", _machine),
        ("parity", _truth),
        ("resume", _truth),
        ("deterministic", _truth),
        ("formats", _truth),
        ("graphs", _truth),
        ("lstm", _truth),
        *((size, _speed) for size in RUNGS),
        ("profile", _profile),
    ):
        if name in parts and parts[name]["rows"]:
            lines += ["", f"## {name}", "", *describe(parts[name]["rows"])]
    return "\n".join(lines) + "\n"


def end_line(part: Part) -> str:
    """A part's end in one line, for a console."""
    reason = f": {part['reason']}" if part["reason"] else ""
    return f"{part['begun_s']:6.1f} s  {part['name']}: {part['status']} after {part['elapsed_s']:.1f} s{reason}"


def _facts(header: Mapping[str, Any]) -> list[str]:
    hardware, code = header["hardware"], header["code"]
    revision = code.get("git_revision") or code.get("distribution_version") or "unknown"
    changed = " with uncommitted changes" if code.get("git_diff") else ""
    packages = ", ".join(f"{name} {version}" for name, version in header["packages"].items() if version)
    gpus = "; ".join(hardware["gpus"]) or "no GPU"
    return [
        f"{header['time']}, revision {revision}{changed}. {gpus}; {hardware['cpu']}, {hardware['usable_cores']} cores, "
        f"{hardware['memory_gib']} GiB. Python {header['python']}, {packages}.",
        "",
        f"`{' '.join(header['command'])}`: {'the full form' if header['is_full'] else 'the small form, on a CPU'}.",
    ]


def _ends(parts: Sequence[Part]) -> list[str]:
    rows = [
        (part["name"], part["status"], f"{part['begun_s']:.0f}", f"{part['elapsed_s']:.0f}", part["reason"])
        for part in parts
    ]
    return _table(("part", "end", "from, s", "for, s", "why"), rows)


def _machine(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        if "kernel" in row:
            found.append((row["row"], row["kernel"]))
        elif "bytes_per_s" in row:
            found.append((row["row"], f"{row['bytes_per_s'] / 1e9:,.0f} GB/s, read and written"))
        elif "flops_per_s" in row:
            found.append((row["row"], f"{row['flops_per_s'] / 1e12:,.2f} TFLOP/s"))
        elif "version" in row:
            found.append((row["row"], row["version"] or "not installed"))
        else:
            found.append((row["row"], ", ".join(f"{key} {value}" for key, value in row.items() if key != "row")))
    return _table(("", ""), found)


def _truth(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        differences = [
            "" if row.get(name) is None else f"{row[name]:.1e}"
            for name in ("loss_difference", "grad_norm_difference", "parameter_difference", "gradient_difference")
        ]
        verdict = row.get("status", "")
        if "passed" in row:
            verdict = "pass" if row["passed"] else "FAIL"
        elif "is_right" in row:
            verdict = "right" if row["is_right"] else "WRONG"
        found.append((row["row"], *differences, verdict, row.get("reason", "")))
    return _table(("", "loss", "gradient norm", "parameters", "gradients", "", "why"), found)


def _speed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        if row["status"] != PASSED:
            found.append((row["row"], row["status"], *("",) * 7, row["reason"]))
            continue
        low, high = row["tokens_per_s_quartiles"]
        readings = row["readings"]
        power = f"{readings['power_w']:.0f} W" if "power_w" in readings else ""
        clock = f"{readings['sm_clock_mhz']:.0f} MHz" if "sm_clock_mhz" in readings else ""
        cells = (
            row["row"],
            f"{row['tokens_per_s']:,.0f}",
            f"{low:,.0f} to {high:,.0f}",
            f"{row['step_s'] * 1e3:.1f}",
            f"{row['micro_size']} of {row['global_size']}",
            _percent(row["mfu"]),
            _percent(row["mfu_causal"]),
            f"{row['peak_bytes'] / _GIB:.2f}",
            ", ".join(filter(None, (power, clock))),
            "" if row["passed"] else "FAIL: a loss was not finite",
        )
        found.append(cells)
    headings = (
        "",
        "tokens/s",
        "quartiles",
        "step, ms",
        "sequences",
        "MFU 6N+12Lds",
        "MFU 6N+6Lds",
        "peak GiB",
        "read",
        "",
    )
    formats = sorted({row["format"] for row in rows if row["status"] == PASSED and row["peak_flops"]})
    peaks = {row["format"]: row["peak_flops"] for row in rows if row["status"] == PASSED}
    against = ", ".join(f"{name} {peaks[name] / 1e12:,.0f} TFLOP/s" for name in formats)
    note = [f"MFU against dense peaks: {against}."] if against else ["The peak of this device is not known: no MFU."]
    return [*_table(headings, found), "", *note]


def _profile(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    kernels = [row for row in rows if row["row"].startswith("kernel ")]
    for row in rows:
        if row["row"] == "shares":
            shares = ", ".join(f"{name} {row[name]:.1%}" for name in row if name not in ("row", "of", "step_s"))
            lines += [f"{row['of']}: {shares}; a profiled step takes {row['step_s'] * 1e3:.1f} ms.", ""]
        if row["row"] == "drift control" and row["status"] == PASSED:
            now = row["tokens_per_s"]
            lines += [f"The same rung once more: {now:,.0f} tokens/s, {now / row['before']:.3f} of before.", ""]
        if row.get("passed") is False:
            lines += [f"{row['row']}: {row.get('status')}, {row.get('reason', '')}", ""]
    cells = [(k["name"][:100], str(k["num_calls"]), f"{k['total_ms']:.2f}", f"{k['share']:.1%}") for k in kernels]
    return [*lines, *_table(("kernel", "calls", "ms", "share"), cells)]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
