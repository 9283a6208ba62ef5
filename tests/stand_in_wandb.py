"""A stand-in for a wandb server: it keeps the history that a client uploads, as the real one does, by line number.

wandb's own client and wandb-core talk to it. What it answers is the least with which they upload a run and resume it.
"""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "tester"
KEY = "0" * 40


@dataclass
class StoredRun:
    """One run on the server.

    Attributes:
        history: history lines by line number.
        summary: its summary.
        config: its configuration, as wandb wraps it.
    """

    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """The logged steps in the order of lines."""
        return [line["step"] for _, line in sorted(self.history.items())]


@dataclass
class StandInServer:
    """Where it listens, and what it has.

    Attributes:
        url: address.
        runs: runs by id.
        refuses: answers every question with an error.
        views: saved workspaces.
    """

    url: str
    runs: dict[str, StoredRun] = field(default_factory=dict)
    refuses: bool = False
    views: list[dict[str, Any]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What sends a client here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer one GraphQL request."""
        project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": ENTITY}}
        if "RunResumeStatus" in query:
            run = self.runs.get(variables["name"])
            return {"model": project | {"bucket": None if run is None else _bucket(variables["name"], run)}}
        if "UpsertBucket" in query:
            is_new = variables["name"] not in self.runs
            run = self.runs.setdefault(variables["name"], StoredRun())
            run.config |= json.loads(variables.get("config") or "{}")
            return {
                "upsertBucket": {"bucket": _bucket(variables["name"], run) | {"project": project}, "inserted": is_new}
            }
        if "query Run(" in query or "RunHistoryKeys" in query:
            return {"project": {"run": _public_run(variables["name"], self.runs.get(variables["name"]))}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "upsertView" in query:
            self.views.append(variables)
            return {"upsertView": {"view": {"id": "v", "name": variables["name"]}, "inserted": True}}
        if "viewer" in query:
            viewer = {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer | {"email": None, "name": ENTITY, "admin": False, "deletedAt": None}}
        return {}

    def stream(self, run_id: str, files: dict[str, Any]) -> None:
        """Take lines of a run's files."""
        run = self.runs[run_id]
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(history["content"], start=history["offset"]):
            run.history[number] = json.loads(line)
        for line in files.get("wandb-summary.json", {}).get("content", []):
            run.summary |= json.loads(line)


def _bucket(run_id: str, run: StoredRun) -> dict[str, Any]:
    tail = [json.dumps(line) for _, line in sorted(run.history.items())[-1:]]
    return {
        "id": run_id,
        "name": run_id,
        "displayName": run_id,
        "description": None,
        "notes": None,
        "sweepName": None,
        "tags": [],
        "config": json.dumps(run.config),
        "summaryMetrics": json.dumps(run.summary),
        "historyLineCount": len(run.history),
        "eventsLineCount": 0,
        "logLineCount": 0,
        "historyTail": json.dumps(tail),
        "eventsTail": json.dumps([]),
        # Tells that the run has started.
        "wandbConfig": json.dumps({"t": {}}),
    }


def _public_run(run_id: str, run: StoredRun | None) -> dict[str, Any] | None:
    if run is None:
        return None
    known = {
        "id": run_id,
        "name": run_id,
        "displayName": run_id,
        "state": "finished",
        "tags": [],
        "createdAt": "2026-01-01T00:00:00",
        "config": json.dumps(run.config),
        "summaryMetrics": json.dumps(run.summary),
        "systemMetrics": "{}",
        "historyLineCount": len(run.history),
        "historyKeys": {"lastStep": max((line["_step"] for line in run.history.values()), default=-1)},
        "user": {"name": ENTITY, "username": ENTITY},
        "projectId": "1",
        "readOnly": False,
    }
    unknown = ("sweepName", "group", "jobType", "commit", "heartbeatAt", "description", "notes")
    return known | dict.fromkeys(unknown)


@contextmanager
def stand_in_server() -> Iterator[StandInServer]:
    """Serve from a thread."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if server.refuses:
                self._reply(403, {"errors": [{"message": "permission denied"}]})
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
                self._reply(200, {})
            elif self.path.endswith("/graphql"):
                request = json.loads(body)
                self._reply(200, {"data": server.answer(request["query"], request.get("variables") or {})})
            else:
                # wandb's reports about itself.
                self._reply(200, {})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._reply(200, {})

        def do_GET(self) -> None:
            self._reply(200, {})

        def _reply(self, status: int, values: dict[str, Any]) -> None:
            content = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = StandInServer(f"http://127.0.0.1:{listener.server_port}")
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
