"""Numbers of bytes for people."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_text(num_bytes: float) -> str:
    """Bytes in the largest unit of which there is one, a power of 1024: 512 B, 3.4 MiB, 1.0 GiB."""
    for unit in _UNITS[:-1]:
        # What would be rounded to the next unit is one of it.
        if round(num_bytes, 1) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} {_UNITS[-1]}"
