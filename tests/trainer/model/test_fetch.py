"""A pretrained model is downloaded once on each node, and where that fails all ranks say so."""

import dataclasses
import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.support import run_on_ranks
from trainer.model.fetch import fetch_pretrained

_COMMIT = "0123456789" * 4
_FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download of one model needs."""

    requests: Counter[str] = Counter()

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.requests[f"{self.command} {self.path.rpartition('/')[2]}"] += 1
        headers = {"X-Repo-Commit": _COMMIT}
        if self.path.startswith("/api/models/tiny/model/"):
            files = [
                {"type": "file", "path": name, "size": len(contents), "oid": _object_id(contents)}
                for name, contents in _FILES.items()
            ]
            siblings = [{"rfilename": name} for name in _FILES]
            about = {"id": "tiny/model", "sha": _COMMIT, "siblings": siblings}
            body = json.dumps(files if "/tree/" in self.path else about).encode()
        elif self.path.startswith(f"/tiny/model/resolve/{_COMMIT}/"):
            body = _FILES[self.path.rpartition("/")[2]]
            headers["ETag"] = _object_id(body)
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def _object_id(contents: bytes) -> str:
    return hashlib.sha1(contents).hexdigest()


def _fetch(ranks: Ranks, root: Path, endpoint: str) -> None:
    from huggingface_hub import constants

    # Ranks 0 and 1 are one node, rank 2 is another, with a disk of its own.
    node = ranks.rank // 2
    ranks = dataclasses.replace(ranks, local_rank=ranks.rank % 2)
    constants.ENDPOINT, constants.HF_HUB_CACHE = endpoint, str(root / f"node-{node}")
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    folder = Path(fetch_pretrained("tiny/model", ranks))
    assert folder.is_relative_to(root / f"node-{node}")
    assert (folder / "model.safetensors").read_bytes() == _FILES["model.safetensors"]
    assert fetch_pretrained(str(folder), ranks) == str(folder)
    # On one node alone: those of the other would wait for ever.
    with pytest.raises(UserError, match=r"model.pretrained=.* is neither a folder nor to be had \(rank 2: "):
        fetch_pretrained(str(root / "local") if node == 0 else "tiny/nothing", ranks)


def test_once_on_each_node(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    _Hub.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            run_on_ranks(_fetch, 3, tmp_path, f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
    # Its library lets one process of a node download a file in any case; the other ranks do not even ask.
    assert _Hub.requests["HEAD model.safetensors"] == _Hub.requests["GET model.safetensors"] == 2, _Hub.requests
