"""Checkpoints by URL: what a folder of this machine keeps, an object store keeps too."""

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from sharding.part import part_of
from sharding.ranks.errors import RunFailure, UserError
from sharding.ranks.local_group import free_port
from sharding.ranks.process_group import Ranks
from tests.saved_state import whole_tensor
from tests.sharding.engine_cases import random_batch, tiny_engine
from tests.support import command_environment, shardline, trained, wait_until, write_empty_checkpoint
from trainer.attempt import begin_attempt, check_continuation
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.inventory import verify_checkpoints
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.reference import resolve_checkpoint
from trainer.checkpoint.tensor_file import TensorFile
from trainer.checkpoint.training_state import TrainingState
from trainer.config import RunConfig, parse_config
from trainer.config.rules import World
from trainer.files.storage import UrlPath, list_folders, locate
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import list_checkpoints

_ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


class _Line:
    """A way to a server of this machine, which can be cut and mended."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self.port = free_port()
        self._ends: list[socket.socket] = []
        self.mend()

    def mend(self) -> None:
        self._door = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, args=(self._door,), daemon=True).start()

    def cut(self) -> None:
        for end in (self._door, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._door.close()

    def _serve(self, door: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = door.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._server_port))
                except ConnectionRefusedError:
                    # It is still starting. Were the client kept, it would wait for an answer that never comes.
                    client.close()
                    continue
                self._ends += [client, server]
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=_copy, args=ends, daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with source, contextlib.suppress(OSError):
        while received := source.recv(1 << 16):
            target.sendall(received)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def s3_line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Line]:
    """The way to a local server that speaks S3."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    with (tmp_path_factory.mktemp("s3") / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    line = _Line(port)
    try:
        yield line
    finally:
        line.cut()
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def s3_variables(s3_line: _Line) -> Iterator[dict[str, str]]:
    """Variables that lead to a bucket ``bucket`` of that server."""
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_line.port}",
        "AWS_ACCESS_KEY_ID": "a-key-id-of-the-test",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        file_system = fsspec.filesystem("s3", skip_instance_cache=True)
        wait_until(lambda: _answers(file_system), what="an S3 server")
        file_system.mkdir("bucket")
        yield variables
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _answers(file_system: Any) -> bool:
    try:
        file_system.ls("")
    except OSError:
        return False
    return True


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place in an object store."""
    if request.param == "s3":
        request.getfixturevalue("s3_variables")
        return f"s3://bucket/{tmp_path.parent.name}-{tmp_path.name}"
    return f"memory:/{tmp_path}"


class _Run:
    """A tiny engine on one rank, and what saves it."""

    def __init__(self, root: Path, storage: str | None, *, asynchronous: bool = False, **settings: int) -> None:
        self.engine = tiny_engine(_ALONE, "none")
        self.warnings: list[str] = []
        checkpoint = {"asynchronous": asynchronous, "every_steps": 1, "keep_last": 2, "storage": storage} | settings
        values = {"name": "one", "output_dir": str(root), "steps": 9, "evaluation": {"every_steps": 1}}
        self.config = parse_config(
            values | {"model": {"architecture": "llama"}, "parallel": {"strategy": "none"}, "checkpoint": checkpoint},
            "test",
        )
        self.folder = RunFolder.of(self.config)
        self.checkpointer = Checkpointer(
            self.config,
            self.folder,
            lambda _: "data",
            _ALONE,
            lambda: None,
            warn=self.warnings.append,
            notify=lambda *_: None,
        )
        self.step = 0

    def train_and_save(self, num_steps: int, losses: tuple[float, ...] = ()) -> None:
        for index in range(num_steps):
            self.engine.train_batch([random_batch(self.step)], 20)
            self.engine.clip_grad_norm(1.0)
            self.engine.step(1e-2)
            self.step += 1
            counters = dict.fromkeys(("num_samples", "num_tokens", "num_skipped_steps", "num_skipped_in_a_row"), 0)
            evaluated = {"eval_metrics": {"loss": losses[index]}} if losses else {}
            state = TrainingState(step=self.step, schedule_total_steps=9, seed=1, **evaluated, **counters)
            self.checkpointer.start_saving(self.engine, state)
        self.checkpointer.finish()
        self.checkpointer.close()

    def saved_steps(self) -> list[int]:
        return [step for step, _ in list_checkpoints(self.folder.checkpoints_dir)]


def _tensors(run: _Run) -> dict[str, torch.Tensor]:
    return {part.name: part.tensor.clone() for part in run.engine.state(with_optimizer=True)}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_store_holds_what_a_folder_does(
    tmp_path: Path, url: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, remote = _Run(tmp_path, None), _Run(tmp_path, url, asynchronous=asynchronous)
    for run in (local, remote):
        run.train_and_save(3)
        assert run.saved_steps() == [2, 3]
    places = [local.folder.checkpoint_path(3), remote.folder.checkpoint_path(3)]
    assert str(places[1]) == f"{url}/one/step-00000003"
    files = [{path.name: path.read_bytes() for path in list_folders(place)} for place in places]
    # Manifests differ in the configuration alone, which names the storage.
    manifests = [json.loads(contents.pop("manifest.json")) for contents in files]
    assert files[0] == files[1]
    assert files[0]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]
    assert [path.name for path in list_folders(remote.folder.checkpoints_dir)] == ["step-00000002", "step-00000003"]
    monkeypatch.setenv("SHARDLINE_CACHE", str(tmp_path))
    assert {one.status for one in verify_checkpoints(remote.folder.checkpoints_dir)} == {"complete"}

    continued = _Run(tmp_path, url)
    restored = continued.checkpointer.resume(continued.engine)
    assert restored is not None
    assert restored.step == 3
    expected = _tensors(remote)
    assert {name: torch.equal(tensor, expected[name]) for name, tensor in _tensors(continued).items()} == dict.fromkeys(
        expected, True
    )


def test_a_corrupt_checkpoint_in_a_store_is_moved_aside_and_a_later_one_removed(tmp_path: Path, url: str) -> None:
    run = _Run(tmp_path, url, keep_last=0)
    run.train_and_save(3)
    run.folder.path.mkdir(parents=True, exist_ok=True)
    file = run.folder.checkpoint_path(3) / "rank-00000.safetensors"
    assert isinstance(file, UrlPath)
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(bytes(contents))
    continued = _Run(tmp_path, url, keep_last=0)
    restored = continued.checkpointer.resume(continued.engine)
    assert restored is not None
    assert restored.step == 2
    assert continued.saved_steps() == [1, 2]
    assert [path.name for path in list_folders(continued.folder.corrupt_dir)] == ["step-00000003"]
    assert "SHA-256" in continued.warnings[0]
    assert continued.checkpointer.roll_back(continued.engine, 1) is not None
    assert continued.saved_steps() == [1]


def test_a_checkpoint_without_its_manifest_is_none_in_a_store_either(tmp_path: Path, url: str) -> None:
    run = _Run(tmp_path, url, keep_last=1, keep_best=1)
    run.train_and_save(4, losses=(3.0, 1.0, 2.0, 4.0))
    assert run.saved_steps() == [2, 4]
    manifest = run.folder.checkpoint_path(4) / "manifest.json"
    assert isinstance(manifest, UrlPath)
    manifest.unlink()
    assert run.saved_steps() == [2]
    with pytest.raises(UserError, match=r"step-00000004 is not a checkpoint"):
        CheckpointReader(run.folder.checkpoint_path(4))
    # What a killed save has left is overwritten.
    again = _Run(tmp_path, url, keep_last=1, keep_best=1)
    again.train_and_save(4, losses=(3.0, 1.0, 2.0, 4.0))
    CheckpointReader(again.folder.checkpoint_path(4)).verify()


def test_a_store_that_is_away_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run(tmp_path, f"memory:/{tmp_path}")
    run.train_and_save(2)

    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError("the line is down")

    def forbid(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as away:
        away.setattr(fsspec.filesystem("memory"), "info", fail)
        with pytest.raises(RunFailure, match=r"memory://.* cannot be reached for now: the line is down; run again"):
            run.folder.newest_checkpoint()
    with monkeypatch.context() as forbidden:
        forbidden.setattr(fsspec.filesystem("memory"), "info", forbid)
        with pytest.raises(UserError, match=r"memory://.* cannot be reached: not yours; check the URL and the cred"):
            run.folder.newest_checkpoint()
    with monkeypatch.context() as away:
        away.setattr(fsspec.filesystem("memory"), "rm", fail)
        run.train_and_save(1)
    # It could not delete, which is no reason to end; or not be made ready, which is one.
    assert any("older checkpoints were not deleted" in warning for warning in run.warnings)
    with monkeypatch.context() as away:
        away.setattr(fsspec.filesystem("memory"), "open", fail)
        with pytest.raises(RunFailure, match=r"step 4 could not be saved: rank 0: cannot write .*the line is down"):
            run.train_and_save(1)
    assert run.saved_steps()[-1] == 3


def test_a_store_that_goes_away_while_a_checkpoint_is_written(
    tmp_path: Path, s3_variables: dict[str, str], s3_line: _Line
) -> None:
    url = f"s3://bucket/{tmp_path.name}"
    run = _Run(tmp_path, url, asynchronous=True)
    run.train_and_save(1)
    before = _tensors(run)
    run.checkpointer._before_write = lambda _step: s3_line.cut()
    with pytest.raises(RunFailure, match=r"step 2 could not be saved: rank 0: cannot write .*run again to continue"):
        run.train_and_save(1)
    s3_line.mend()
    continued = _Run(tmp_path, url)
    restored = continued.checkpointer.resume(continued.engine)
    assert restored is not None
    assert restored.step == continued.step + 1 == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in _tensors(continued).items())
    continued.step = 1
    continued.train_and_save(1)
    assert continued.saved_steps() == [1, 2]
    CheckpointReader(continued.folder.checkpoint_path(2)).verify()


def test_another_run_starts_from_a_url(tmp_path: Path, url: str) -> None:
    run = _Run(tmp_path, url)
    run.train_and_save(2)
    assert resolve_checkpoint(f"{url}/one") == run.folder.checkpoint_path(2)
    assert resolve_checkpoint(f"{url}/one@1") == run.folder.checkpoint_path(1)
    with pytest.raises(UserError, match=r"there is no checkpoint .*/one/step-00000007"):
        resolve_checkpoint(f"{url}/one@7")
    with pytest.raises(UserError, match="has no checkpoint"):
        resolve_checkpoint(f"{url}/another")


@pytest.fixture
def load(values: dict[str, Any]) -> Callable[..., RunConfig]:
    """The tiny run's configuration with other settings of checkpoints."""

    def load(**checkpoint: Any) -> RunConfig:
        return parse_config(values | {"checkpoint": checkpoint}, "test")

    return load


def _begin(config: RunConfig) -> RunFolder:
    folder = RunFolder.of(config)
    begin_attempt(folder, config, World(2, has_gpu=False), [])
    return folder


def test_a_storage_that_changes_forgets_no_checkpoint(load: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = _begin(load())
    write_empty_checkpoint(folder.path / "checkpoints" / "step-00000004", 4)
    moved = load(storage=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"of step 0, but this run has one of step 4 in .*copy it there"):
        check_continuation(RunFolder.of(moved), moved)
    shutil.copytree(folder.path / "checkpoints", tmp_path / "elsewhere" / "tiny")
    check_continuation(RunFolder.of(moved), moved)
    # From here on commands that are given the folder alone look there.
    assert RunFolder(folder.path).newest_checkpoint() == (4, folder.path / "checkpoints" / "step-00000004")
    _begin(moved)
    assert RunFolder(folder.path).newest_checkpoint() == (4, tmp_path / "elsewhere" / "tiny" / "step-00000004")


def test_a_file_url_is_a_folder(load: Callable[..., RunConfig], tmp_path: Path) -> None:
    assert RunFolder.of(load(storage=f"file://{tmp_path}/there")).checkpoints_dir == tmp_path / "there" / "tiny"


def test_credentials_in_a_url_are_refused_and_not_repeated(load: Callable[..., RunConfig]) -> None:
    for url in ("s3://name:pass-word@bucket/x", "s3://key-of-mine@bucket/x"):
        with pytest.raises(UserError, match=r"checkpoint.storage") as refused:
            RunFolder.of(load(storage=url))
        assert not any(part in str(refused.value) for part in ("pass-word", "key-of-mine"))
    with pytest.raises(UserError, match=r"checkpoint.from") as refused:
        resolve_checkpoint("s3://key-of-mine@bucket/x@3")
    assert "key-of-mine" not in str(refused.value)


def test_stores_that_nothing_can_reach_are_named() -> None:
    with pytest.raises(UserError, match=r"checkpoint.storage=nowhere://x: .*Protocol not known: nowhere"):
        locate("checkpoint.storage", "nowhere://x")
    if not _is_installed("gcsfs"):
        with pytest.raises(UserError, match=r"gs://b/x needs gcsfs, .*pip install 'shardline\[gs\]'"):
            locate("checkpoint.storage", "gs://b/x")
    if not _is_installed("s3fs"):
        with pytest.raises(UserError, match=r"s3://b/x needs s3fs, .*pip install 'shardline\[s3\]'"):
            locate("checkpoint.storage", "s3://b/x")


def _is_installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


@settings(max_examples=60)
@given(data=st.data())
def test_any_box_of_any_tensor_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]))
    whole = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    path = tmp_path_factory.mktemp("boxes") / "file"
    # By the library: what is tested is reading alone.
    path.write_bytes(save({"before": torch.ones(3, 3), "whole": whole, "empty": torch.empty(0, 3)}))
    begins = [data.draw(st.integers(0, size - 1)) for size in shape]
    index = tuple(slice(b, data.draw(st.integers(b + 1, size))) for b, size in zip(begins, shape, strict=True))
    expected = whole[index] if index else whole
    target = torch.zeros_like(expected)
    file = TensorFile(path)
    file.read_into("whole", index, target)
    assert torch.equal(target, expected)
    assert whole_tensor(file, "empty").shape == (0, 3)
    file.close()


def test_rows_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.checkpoint.tensor_file._CHUNK_BYTES", 64)
    whole = torch.randn(50, 3, 2)
    (tmp_path / "file").write_bytes(save({"whole": whole}))
    target = torch.zeros(40, 2, 2)
    TensorFile(tmp_path / "file").read_into("whole", (slice(7, 47), slice(1, 3), slice(0, 2)), target)
    assert torch.equal(target, whole[7:47, 1:3])


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"", "it ends after 0 bytes"),
        (b"\xff" * 8, "its header cannot have"),
        (b"\x02" + bytes(7) + b"[]", "not a JSON object"),
        (b"\x03" + bytes(7) + b"{a}", "Expecting property name"),
        (save({"a": torch.ones(4)})[:-1], "does not fit"),
        (save({"a": torch.ones(4)}).replace(b'"F32"', b'"F99"'), "nothing sensible of a"),
        (save({"a": torch.ones(4)}).replace(b"[4]", b"[5]"), "does not fit"),
        (save({"a": torch.ones(4)}).replace(b"[0,16]", b"[16,0]"), "does not fit"),
    ],
)
def test_what_is_no_safetensors_file_is_told(tmp_path: Path, contents: bytes, said: str) -> None:
    (tmp_path / "file").write_bytes(contents)
    with pytest.raises(ValueError, match=said):
        TensorFile(tmp_path / "file")


def test_few_files_stay_open(tmp_path: Path) -> None:
    run = _Run(tmp_path, None, keep_last=0)
    run.train_and_save(1)
    reader = CheckpointReader(run.folder.checkpoint_path(1))
    source = Path(str(reader.folder)) / "rank-00000.safetensors"
    for index in range(20):
        shutil.copy(source, source.with_name(f"{index}"))
        reader._own.file(f"{index}")
    assert len(reader._own._open_files) == 8
    (name, entry), *_ = reader.tensors.items()
    tensor = torch.empty(entry.shape)
    reader.read_into(part_of(name, tensor))
    assert torch.equal(tensor, _tensors(run)[name])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_goes_on_from_a_bucket_on_another_machine(
    make_config: Callable[..., Path], s3_variables: dict[str, str], tmp_path: Path
) -> None:
    storage = f"s3://bucket/{tmp_path.name}"
    config = make_config("cloud", steps=4, checkpoint={"every_steps": 2, "storage": storage})
    trained(shardline("run", config, "steps=2", "--nproc-per-node", 2))
    run_dir = config.parent / "runs" / "cloud"
    assert not (run_dir / "checkpoints").exists()
    # The machine is gone, with its disk.
    shutil.rmtree(run_dir)
    other = shardline("run", config, "optimizer.lr=1e-3", "--nproc-per-node", 2)
    assert other.returncode == 2
    assert "optimizer.lr" in other.stderr
    trained(shardline("run", config, "--nproc-per-node", 2))
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [3, 4]
    listed = shardline("checkpoint", "list", run_dir)
    assert "step-00000002" in listed.stdout
    assert f"{storage}/cloud" in listed.stdout
    for run in (run_dir, f"{storage}/cloud"):
        verified = shardline("checkpoint", "verify", run)
        assert verified.returncode == 0, verified.stdout
        assert verified.stdout.count("complete") == 2
    exported = shardline("export", run_dir, "--to", tmp_path / "model")
    assert exported.returncode == 0, exported.stderr
    fork = make_config("fork", steps=5, checkpoint={"from": f"{storage}/cloud@4"})
    trained(shardline("run", fork, "--nproc-per-node", 2))
    files = [path for path in config.parent.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert files
    assert not any(s3_variables["AWS_SECRET_ACCESS_KEY"].encode() in path.read_bytes() for path in files)
    assert command_environment()["AWS_SECRET_ACCESS_KEY"] == s3_variables["AWS_SECRET_ACCESS_KEY"]
