"""Frozen parameters are written once: what checkpoints refer to, and what becomes of it."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.engine import Engine
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from sharding.state import frozen_names
from tests.saved_state import stored_state
from tests.sharding.engine_cases import random_batch, tiny_engine
from tests.support import TINY_MODEL
from trainer.checkpoint.base_manifest import CorruptBase, list_bases, read_base
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.inventory import take_inventory, verify_checkpoints
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.training_state import TrainingState
from trainer.config import parse_config
from trainer.files.storage import CheckpointPath, file_sizes, list_folders
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import list_checkpoints

_ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
_FROZEN = ["model.embed_tokens.*", "model.layers.[01].*"]


class _Run:
    """A tiny engine on one rank, most of it frozen, and what saves it."""

    def __init__(
        self,
        root: Path,
        name: str = "one",
        *,
        frozen: list[str] = _FROZEN,
        seed: int = 1,
        before_write: Callable[[int], None] = lambda _: None,
        **checkpoint: Any,
    ) -> None:
        model = TINY_MODEL | {"freeze": frozen}
        self.engine: Engine = tiny_engine(_ALONE, "none", model=model, seed=seed)
        values = {"name": name, "output_dir": str(root), "steps": 9, "model": model, "parallel": {"strategy": "none"}}
        config = parse_config(values | {"checkpoint": {"every_steps": 1, "keep_last": 2} | checkpoint}, "test")
        self.folder = RunFolder.of(config)
        self.checkpoints: CheckpointPath = self.folder.checkpoints_dir
        self.checkpointer = Checkpointer(
            config,
            self.folder,
            lambda _: "data",
            _ALONE,
            lambda: None,
            notify=lambda *_: None,
            before_write=before_write,
        )
        self.step = 0

    def train_and_save(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.engine.train_batch([random_batch(self.step)], 20)
            self.engine.clip_grad_norm(1.0)
            self.engine.step(1e-2)
            self.step += 1
            counters = dict.fromkeys(("num_samples", "num_tokens", "num_skipped_steps", "num_skipped_in_a_row"), 0)
            state = TrainingState(step=self.step, schedule_total_steps=9, seed=1, **counters)
            self.checkpointer.start_saving(self.engine, state)
        self.checkpointer.finish()
        self.checkpointer.close()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {part.name: part.tensor.clone() for part in self.engine.state(with_optimizer=True)}

    def change_what_is_frozen(self) -> None:
        parts = {part.name: part for part in self.engine.state(with_optimizer=False)}
        parts["model/model.layers.0.mlp.up_proj.weight"].tensor.mul_(2.0)

    def bases(self) -> list[str]:
        return [folder.name for folder in list_bases(self.checkpoints)]

    def base_file(self, name: str = "rank-00000.safetensors") -> Path:
        (base,) = list_bases(self.checkpoints)
        return Path(str(base)) / name


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _verify(checkpoints: CheckpointPath) -> tuple[int, str]:
    found = list(verify_checkpoints(checkpoints))
    return 2 if any(one.status == "corrupt" for one in found) else 0, "\n".join(one.line() for one in found)


@pytest.fixture(autouse=True)
def _no_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLINE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("is_remote", [False, True])
def test_it_is_written_once_and_checkpoints_read_as_if_they_had_it(
    tmp_path: Path, asynchronous: bool, is_remote: bool
) -> None:
    storage = {"storage": f"memory:/{tmp_path}"} if is_remote else {}
    run = _Run(tmp_path, asynchronous=asynchronous, **storage)
    run.train_and_save()
    (base,) = list_bases(run.checkpoints)
    sizes = file_sizes(base)
    run.train_and_save(2)
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [2, 3]
    assert [folder.name for folder in list_bases(run.checkpoints)] == [base.name]
    assert file_sizes(base) == sizes
    frozen, tensors = frozen_names(run.engine), run.tensors()
    assert frozen
    assert read_base(base).tensors.keys() == frozen
    folder = run.folder.checkpoint_path(3)
    manifest = CheckpointReader(folder).manifest
    assert (manifest.format_version, manifest.base) == (5, base.name)
    assert manifest.tensors.keys() == tensors.keys() - frozen
    num_bytes = {name: 4 * math.prod(tensor.shape) for name, tensor in tensors.items()}
    own = sum(num_bytes[name] for name in manifest.tensors)
    # A header comes on top.
    assert own < file_sizes(folder)["rank-00000.safetensors"] < own + 10_000
    assert sum(num_bytes[name] for name in frozen) < sum(sizes.values())
    _assert_equal(stored_state(folder), tensors)
    continued = _Run(tmp_path, asynchronous=asynchronous, seed=2, **storage)
    restored = continued.checkpointer.resume(continued.engine)
    assert restored is not None
    assert restored.step == 3
    _assert_equal(continued.tensors(), tensors)
    exit_code, said = _verify(run.checkpoints)
    assert exit_code == 0
    assert said.count(f"{base.name}: complete") == 1
    assert said.count("complete") == 3
    inventory = take_inventory(run.checkpoints)
    assert inventory.corrupt == []
    assert re.search(r" [KM]iB of frozen parameters, to which 2 of the checkpoints refer", inventory.text())


def test_without_frozen_parameters_nothing_is_said_of_it(tmp_path: Path) -> None:
    run = _Run(tmp_path, frozen=[])
    run.train_and_save()
    values = json.loads((run.folder.checkpoint_path(1) / "manifest.json").read_bytes())
    assert values["format_version"] == 4
    assert "base" not in values
    assert run.bases() == []


def test_half_a_base_is_written_anew(tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    failing = _Run(tmp_path, before_write=fail)
    with pytest.raises(UserError, match=r"step 1 could not be saved: .*no space left"):
        failing.train_and_save()
    assert list_checkpoints(failing.checkpoints) == []
    run = _Run(tmp_path)
    run.train_and_save()
    # As a process leaves it that is killed between its files and its manifest, and another that writes a file.
    for name in ("manifest.json", "rank-00000.safetensors"):
        run.base_file(name).unlink()
        with pytest.raises(CorruptBase, match="restore that folder from a copy"):
            CheckpointReader(run.folder.checkpoint_path(1))
        _Run(tmp_path).train_and_save()
        CheckpointReader(run.folder.checkpoint_path(1)).verify()


def test_what_was_thought_frozen_and_changes_is_not_lost(tmp_path: Path) -> None:
    run = _Run(tmp_path, keep_last=2)
    run.train_and_save()
    (first,) = run.bases()
    run.change_what_is_frozen()
    run.train_and_save()
    (second,) = set(run.bases()) - {first}
    _assert_equal(stored_state(run.folder.checkpoint_path(2)), run.tensors())
    CheckpointReader(run.folder.checkpoint_path(1)).verify()
    # The first goes with the last checkpoint that refers to it.
    run.train_and_save()
    assert run.bases() == [second]
    assert CheckpointReader(run.folder.checkpoint_path(3)).manifest.base == second


def test_no_base_is_deleted_of_which_it_is_not_known_that_nobody_needs_it(tmp_path: Path) -> None:
    run = _Run(tmp_path, keep_last=2)
    run.train_and_save(2)
    first = run.bases()
    # One that was set aside refers to it as well; and what one refers to that cannot be read is not known.
    aside = run.folder.corrupt_dir / "step-00000001"
    shutil.copytree(str(run.folder.checkpoint_path(1)), str(aside))
    run.change_what_is_frozen()
    run.train_and_save(3)
    assert len(run.bases()) == 2
    (aside / "manifest.json").write_bytes(b"{")  # type: ignore[union-attr]
    run.train_and_save()
    assert len(run.bases()) == 2
    shutil.rmtree(str(aside))
    run.train_and_save()
    assert len(run.bases()) == 1
    assert run.bases() != first


def test_a_corrupt_base_is_named_and_nothing_is_moved(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.train_and_save(2)
    file = run.base_file()
    whole = file.read_bytes()
    for contents, said in (
        (whole[:-1], "rank-00000.safetensors has .* bytes instead of"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "do not have the SHA-256 that the manifest says"),
    ):
        file.write_bytes(contents)
        exit_code, output = _verify(run.checkpoints)
        assert exit_code == 2
        assert output.count(f"{file.parent} are corrupt") == 2
        continued = _Run(tmp_path)
        with pytest.raises(CorruptBase, match=f"frozen parameters .*{file.parent.name} are corrupt: .*{said}"):
            continued.checkpointer.resume(continued.engine)
    file.write_bytes(whole)
    assert not list_folders(run.folder.corrupt_dir)
    assert _verify(run.checkpoints)[0] == 0
    shutil.rmtree(file.parent)
    with pytest.raises(CorruptBase, match=r"are corrupt: there is no manifest\.json"):
        CheckpointReader(run.folder.checkpoint_path(2))


def test_a_fork_needs_nothing_of_the_run_it_came_from(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.train_and_save(2)
    expected = run.tensors()
    for load in ("all", "weights"):
        fork = _Run(tmp_path, f"fork-{load}", seed=2, **{"from": str(run.folder.path), "load": load})
        restored = fork.checkpointer.resume(fork.engine)
        assert (restored is None) == (load == "weights")
        for name, tensor in fork.tensors().items():
            assert torch.equal(tensor, expected[name]) or not name.startswith("model/"), name
        fork.step = 2
        fork.train_and_save()
        assert fork.bases() == run.bases()
    shutil.rmtree(run.folder.path)
    for load in ("all", "weights"):
        fork_folder = RunFolder(tmp_path / f"fork-{load}")
        CheckpointReader(fork_folder.checkpoint_path(3)).verify()
        assert stored_state(fork_folder.checkpoint_path(3)).keys() == expected.keys()
