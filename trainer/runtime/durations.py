"""Durations for people."""


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: 42 s, 3 min 20 s, 5 h 07 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
