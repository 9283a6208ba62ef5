"""A server of rows as its clients meet it: right answers, bad input, slow and greedy clients, and its end."""

import base64
import contextlib
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.trainer.serving.serving_support import (
    DIGITS,
    TABLE,
    Server,
    detail,
    digits_answer,
    digits_folder,
    refused_by,
    serving,
    table_folder,
)
from trainer.serving.options import ServeOptions
from trainer.serving.row_app import build_row_app
from trainer.serving.served_model import ServedModel

KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with small bounds."""
    folder = digits_folder(tmp_path_factory.mktemp("serving") / "digits")
    bounds = ("--max-body", "20000", "--timeout-s", "1", "--max-batch", "8", "--max-queue", "16")
    with serving(folder, *bounds) as server:
        yield server


def random_pixels(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 17, 64).tolist()  # type: ignore[no-any-return]


def assert_right(answer: httpx.Response, *seeds: int) -> None:
    assert answer.status_code == 200, answer.text
    predictions = answer.json()["predictions"]
    assert len(predictions) == len(seeds)
    for prediction, seed in zip(predictions, seeds, strict=True):
        expected = digits_answer(random_pixels(seed))
        assert prediction["class"] == str(expected.argmax())
        assert list(prediction["probabilities"]) == DIGITS.classes
        assert list(prediction["probabilities"].values()) == pytest.approx(expected, abs=1e-6)


def test_each_request_has_its_own_right_answer(digits: Server) -> None:
    assert_right(digits.ask({"pixels": random_pixels(0)}), 0)
    assert_right(digits.ask(*({"pixels": random_pixels(seed)} for seed in range(8))), *range(8))
    with httpx.Client() as client, ThreadPoolExecutor(12) as pool:

        def ask(seed: int) -> httpx.Response:
            return client.post(f"{digits.url}/predict", json={"rows": [{"pixels": random_pixels(seed)}]})

        for seed, answer in enumerate(pool.map(ask, range(60))):
            assert_right(answer, seed)
    rows = [
        float(line.split()[-1])
        for line in httpx.get(f"{digits.url}/metrics").text.splitlines()
        if "batch_rows_sum" in line
    ]
    assert rows[0] >= 69


BAD = [
    (b"", "application/json", 422, "Invalid JSON"),
    (b"{", "application/json", 422, "Invalid JSON"),
    (b"\xff\xfe", "application/json", 422, "Invalid JSON"),
    (b"[" * 15_000, "application/json", 422, "Invalid JSON"),
    (b"[]", "application/json", 422, "should be an object"),
    (b'{"rows": []}', "application/json", 422, "at least 1 item"),
    (b'{"rows": [{}]}', "application/json", 422, "rows.0.pixels: Field required"),
    (b'{"rows": [{"pixels": [1, 2]}]}', "application/json", 422, "64 whole numbers from 0 to 16"),
    (b'{"rows": [{"pixels": [[1], [2, 3]]}]}', "application/json", 422, "several lengths"),
    (b'{"rows": [{"pixels": [1e999]}]}', "application/json", 422, "64 whole numbers"),
    (b'{"rows": [{"pixels": [NaN]}]}', "application/json", 422, "64 whole numbers"),
    (b'{"rows": [{"pixels": ' + json.dumps([1e999] * 64).encode() + b"}]}", "application/json", 422, "some are not"),
    (b'{"rows": [{"pixels": [' + b"9" * 5000 + b"]}]}", "application/json", 422, ""),
    (b'{"rows": [{"picture": 1}]}', "application/json", 422, "Extra inputs are not permitted"),
    (json.dumps({"rows": [{"pixels": random_pixels(0)}] * 9}).encode(), "application/json", 422, "at most 8 items"),
    (b'{"rows": "\\ud800"}', "application/json", 422, "Invalid JSON"),
    (b"{}", "application/x-www-form-urlencoded", 415, "this model reads application/json"),
    (b"x" * 20_001, "application/json", 413, "20,001 bytes, and at most 20,000"),
]


@pytest.mark.parametrize(("body", "content_type", "status", "words"), BAD)
def test_bad_input_is_a_sentence_and_repeats_no_infinity(
    digits: Server, body: bytes, content_type: str, status: int, words: str
) -> None:
    answer = digits.send(body, content_type)
    assert answer.status_code == status, answer.text
    assert words in detail(answer)
    assert "Infinity" not in answer.text
    assert len(answer.text) < 1000
    assert_right(digits.ask({"pixels": random_pixels(3)}), 3)


def test_other_paths_and_methods(digits: Server) -> None:
    assert httpx.get(f"{digits.url}/predict").status_code == 405
    assert httpx.get(f"{digits.url}/nothing").status_code == 404
    assert httpx.get(f"{digits.url}/health").json() == {"status": "alive"}
    assert httpx.get(f"{digits.url}/ready").json() == {"status": "ready"}
    about = httpx.get(f"{digits.url}/model").json()
    assert (about["kind"], about["classes"], about["image_shape"]) == ("image", DIGITS.classes, [1, 8, 8])
    described = httpx.get(f"{digits.url}/openapi.json").json()
    assert {"/predict", "/model", "/health", "/ready", "/metrics"} == set(described["paths"])
    for path in ("/", "/docs"):
        page = httpx.get(digits.url + path)
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "http" not in page.text.replace("https://json-schema.org", "")


@contextlib.contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        yield connection


HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def test_a_body_in_chunks_is_bounded_while_it_is_read(digits: Server) -> None:
    with connected(digits) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(5):
            connection.sendall(b"1388\r\n" + b"x" * 5000 + b"\r\n")
        # Its end was never sent.
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    assert b"more than 20,000 bytes" in answer
    with connected(digits) as connection:
        body = json.dumps({"rows": [{"pixels": random_pixels(1)}]}).encode()
        halves = body[:50], body[50:]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(half), half) for half in halves)
        connection.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert received(connection).startswith(b"HTTP/1.1 200 ")


def test_slow_clients_are_let_go_and_nobody_waits_for_them(digits: Server) -> None:
    with connected(digits) as in_body, connected(digits) as in_head, connected(digits) as silent:
        began_at = time.monotonic()
        in_body.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        in_head.sendall(HEAD)
        assert_right(digits.ask({"pixels": random_pixels(2)}), 2)
        answer = received(in_body)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"not whole within 1 s" in answer
        assert received(in_head) == b""
        assert received(silent) == b""
        # A body has a second, and one more in which what still comes is thrown away.
        assert time.monotonic() - began_at < 5


def test_endless_headers_are_cut_off(digits: Server) -> None:
    with connected(digits) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(HEAD)
            for number in range(200):
                connection.sendall(b"X-%d: %s\r\n" % (number, b"x" * 1000))
        assert received(connection) == b""
    with connected(digits) as connection:
        connection.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert received(connection).startswith(b"HTTP/1.1 400 ")


def test_too_many_at_a_time_are_told_to_come_again(digits: Server) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(digits)) for _ in range(16)]
        for connection in slow:
            connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        time.sleep(0.2)
        answer = digits.ask({"pixels": random_pixels(0)})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "too many requests" in detail(answer)
        # Its state is told all the same.
        assert httpx.get(f"{digits.url}/health").status_code == 200
    time.sleep(0.1)
    assert_right(digits.ask({"pixels": random_pixels(0)}), 0)


def test_no_torch_is_in_its_memory(digits: Server) -> None:
    maps = Path(f"/proc/{digits.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "libtorch" not in maps


def test_a_key_is_asked_for_and_never_logged(tmp_path: Path) -> None:
    folder = table_folder(tmp_path / "table")
    row = {"age": 50, "body mass": None, "city": "Oslo"}
    with serving(folder, "--api-key-env", "MY_KEY", MY_KEY=KEY) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-API-Key": KEY + "x"}, {"Authorization": KEY}):
            answer = server.ask(row, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == 401
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
            answer = server.ask(row, headers=headers)
            assert answer.status_code == 200
            # 20 * (50 - 40) / 10 + 2 * 2, in the labels' unit.
            assert answer.json() == {"predictions": [{"value": pytest.approx(100 + 25 * 24)}]}
        for path in ("/health", "/ready", "/", "/docs", "/page.js"):
            assert httpx.get(server.url + path).status_code == 200
        right = {"Authorization": f"Bearer {KEY}"}
        for values, words in (
            ({"age": 1e39}, "less than or equal to 3"),
            ({"age": "a"}, "valid number"),
            ({"age": None, "city": [1]}, "a category is a text"),
            ({"body mass": 3e38}, "body mass is so far from what was trained on"),
            ({"age": 3e38}, "the model's answer is no number"),
            ({"shoe size": 1}, "rows.1.shoe size: Extra inputs are not permitted"),
        ):
            answer = server.ask(row, row | values, headers=right)
            assert answer.status_code == 422
            assert words in detail(answer)
        metrics = httpx.get(f"{server.url}/metrics", headers=right).text
        assert 'shardline_requests_total{path="/predict",status="401"} 4.0' in metrics
        assert 'shardline_requests_total{path="/predict",status="422"} 6.0' in metrics
    assert KEY not in server.log.read_text()


def test_the_end_in_the_middle_of_load_loses_nothing(tmp_path: Path) -> None:
    counts = {"right": 0, "lost": 0, "refused": 0}
    lock = threading.Lock()
    with serving(digits_folder(tmp_path / "digits"), "--timeout-s", "5") as server, contextlib.ExitStack() as stack:
        body = json.dumps({"rows": [{"pixels": random_pixels(7)}]}).encode()
        request = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        right = digits_answer(random_pixels(7)).argmax()

        def client() -> None:
            connection: Any = None
            for _ in range(100_000):
                try:
                    connection = connection or socket.create_connection(("127.0.0.1", server.port), timeout=10)
                except OSError:
                    with lock:
                        counts["refused"] += 1
                    return
                try:
                    connection.sendall(request)
                    answer = b""
                    while answer.count(b"}") < 2:
                        part = connection.recv(65536)
                        if not part:
                            raise ConnectionResetError
                        answer += part
                except OSError:
                    with lock:
                        counts["lost"] += 1
                    return
                with lock:
                    counts["right"] += b'"class":"%d"' % right in answer
                if b"connection: close" in answer:
                    connection.close()
                    connection = None

        slow = stack.enter_context(connected(server))
        slow.sendall(request[:-10])
        clients = [threading.Thread(target=client) for _ in range(16)]
        for one in clients:
            one.start()
        time.sleep(1.0)
        num_before = counts["right"]
        server.process.terminate()
        time.sleep(0.3)
        slow.sendall(request[-10:])
        assert b'"class":"%d"' % right in received(slow)
        for one in clients:
            one.join(20)
        assert server.process.wait(20) == 0
    assert num_before > 50
    assert counts["lost"] == 0
    assert counts["refused"] == 16
    assert counts["right"] >= num_before


def test_a_picture_is_uploaded_as_it_is(tmp_path: Path) -> None:
    recipe = DIGITS.model_copy(update={"max_pixel": 255})
    folder = digits_folder(tmp_path / "pictures")
    (folder / "rows.json").write_text(recipe.model_dump_json())
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(file, "PNG")
    options = ServeOptions("127.0.0.1", 0, 8, 0.0, 8, 100_000, 1, None)
    with TestClient(build_row_app(ServedModel(folder, 1), options)) as client:

        def send(body: bytes) -> Any:
            return client.post("/predict", content=body, headers={"Content-Type": "image/png"})

        uploaded = send(file.getvalue())
        assert uploaded.status_code == 200
        given = {"image": base64.b64encode(file.getvalue()).decode()}
        assert client.post("/predict", json={"rows": [given]}).json() == uploaded.json()
        for body in (b"", b"GIF89a", file.getvalue()[:200]):
            assert send(body).status_code == 422


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = digits_folder(tmp_path / "digits")
    for name in ("prometheus_client", "onnxruntime"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            said = refused_by(capsys, folder, "--port", 0)
        assert f"needs {name}, which is not installed; install it with pip install 'shardline[serve]'" in said


def test_what_cannot_be_served_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = digits_folder(tmp_path / "digits")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port} cannot be listened on (Address already in use)" in refused_by(
            capsys, folder, "--port", port
        )
    zero = ("--port", 0)
    assert "--host nowhere.invalid" in refused_by(capsys, folder, "--host", "nowhere.invalid", *zero)
    assert "neither a run's folder nor an exported model" in refused_by(capsys, tmp_path, *zero)
    assert "NO_SUCH_KEY: this variable is not set" in refused_by(capsys, folder, "--api-key-env", "NO_SUCH_KEY", *zero)
    assert "--step: " in refused_by(capsys, folder, "--step", 3, *zero)
    assert "less than --max-batch" in refused_by(capsys, folder, "--max-queue", 3, *zero)
    (folder / "rows.json").rename(folder / "other.json")
    assert "has no rows.json" in refused_by(capsys, folder, *zero)
    (folder / "rows.json").write_text("{}")
    assert "rows.json cannot be read" in refused_by(capsys, folder, *zero)
    (folder / "rows.json").write_text(TABLE.model_dump_json())
    assert "does not compute on its own rows" in refused_by(capsys, folder, *zero)
    (folder / "model.onnx").write_bytes(b"nothing")
    (folder / "other.json").rename(folder / "rows.json")
    assert "cannot be loaded by onnxruntime" in refused_by(capsys, folder, *zero)
    (folder / "model.onnx").unlink()
    assert "has no model.onnx" in refused_by(capsys, folder, *zero)
    (folder / "deployment.json").write_text("{")
    assert "deployment.json cannot be read" in refused_by(capsys, folder, *zero)
