"""What the kill soak writes down: one line for each kill, recovery and sitting; and their summary."""

import json
import os
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

# Phases by the heartbeat or the failure report; before a rank is up there are none.
NO_RANKS = "launch"


class KillLog:
    """``kills.jsonl`` of a soak."""

    def __init__(self, path: Path) -> None:
        """Read what earlier sittings left."""
        self._path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            # The soak itself may be killed too.
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            self.lines = [json.loads(line) for line in whole]

    @property
    def kills(self) -> list[dict[str, Any]]:
        """The kills so far."""
        return self.of("kill")

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def add(self, kind: str, **values: Any) -> None:
        """Write a line."""
        line = {"kind": kind, "time": round(time.time(), 3), **values}
        self.lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def summary(self) -> dict[str, Any]:
        """Counts and times, for a person and for ``benchmarks/results``."""
        kills = self.kills
        recoveries = [line["recovery_s"] for line in self.of("recovered")]
        of_ranks = [kill for kill in kills if kill["victim"].startswith("rank")]
        return {
            "kills": len(kills),
            "by_victim": dict(sorted(Counter(kill["victim"] for kill in kills).items())),
            "by_phase": dict(sorted(Counter(kill["phase"] for kill in kills).items())),
            "sittings": len(self.of("sitting")),
            "revisions": sorted({line["revision"] for line in self.of("sitting")}),
            "shardline_runs": len(self.of("run")),
            "restarts_in_job": sum(kill["exit_code"] is None for kill in kills),
            "kills_of_ranks_that_the_report_names": sum(bool(kill["is_named"]) for kill in of_ranks),
            "kills_of_ranks": len(of_ranks),
            "recoveries_measured": len(recoveries),
            "recovery_s_mean": round(statistics.mean(recoveries), 1) if recoveries else None,
            "recovery_s_median": round(statistics.median(recoveries), 1) if recoveries else None,
            "recovery_s_max": round(max(recoveries), 1) if recoveries else None,
            "result": self.lines[-1] if self.lines and self.lines[-1]["kind"] == "compared" else "not finished",
        }
