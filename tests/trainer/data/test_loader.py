"""The loader: the same samples in a step under every layout, and exactly where it should begin."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.data.__main__ import make_stream
from sharding.ranks.errors import UserError
from trainer.config import load_config
from trainer.data.facts import SampleFacts
from trainer.data.loader import BatchLoader, evaluation_batches
from trainer.data.mixture import MixtureOrder, WeightedInterleaving
from trainer.data.order import SampleOrder
from trainer.data.packed import PackedSamples
from trainer.data.samples import FILLER, MicroBatch
from trainer.data.shards import TokenStream, num_samples
from trainer.data.skipped_samples import SkippedSamples
from trainer.stages import check_held_out
from trainer.tasks.next_tokens import next_token_batch

LENGTH = 7
GLOBAL_SIZE = 24


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    """1000 tokens in shards that no sequence divides."""
    return make_stream(tmp_path_factory.mktemp("stream"), 1000, 333)


def _samples(stream: TokenStream) -> PackedSamples:
    return PackedSamples(lambda _: stream, SampleFacts(LENGTH))


def _batch(micro: MicroBatch) -> dict[str, torch.Tensor]:
    return next_token_batch(micro.samples, micro.positions)


def _loader(
    stream: TokenStream,
    rank: int,
    degree: int,
    micro_size: int,
    start: int = 0,
    ahead: int = 0,
    skipped: SkippedSamples | None = None,
) -> BatchLoader:
    order = SampleOrder(5, num_samples(stream.num_tokens, LENGTH))
    return BatchLoader(
        _samples(stream),
        order,
        global_size=GLOBAL_SIZE,
        micro_size=micro_size,
        dp_rank=rank,
        dp_degree=degree,
        start_sample=start,
        skipped=skipped,
        prefetch_steps=ahead,
    )


def _rows(step: list[MicroBatch]) -> list[tuple[int, ...]]:
    return [tuple(row) for micro in step for row in micro.samples["tokens"].tolist()]


def _positions(step: list[MicroBatch]) -> list[int]:
    return [position for micro in step for position in micro.positions.tolist()]


@pytest.mark.parametrize(
    ("degree", "micro_size"), [(1, 24), (1, 5 - 4), (2, 3), (2, 12), (3, 2), (4, 6), (6, 1), (8, 3), (24, 1)]
)
def test_a_step_has_the_same_samples_under_every_layout(stream: TokenStream, degree: int, micro_size: int) -> None:
    plain = _loader(stream, 0, 1, GLOBAL_SIZE)
    loaders = [_loader(stream, rank, degree, micro_size) for rank in range(degree)]
    for number in range(9):
        steps = [loader.next_step() for loader in loaders]
        assert all(batch.samples["tokens"].shape == (micro_size, LENGTH + 1) for step in steps for batch in step)
        assert all(len(step) == GLOBAL_SIZE // (degree * micro_size) for step in steps)
        # Micro-batch by micro-batch and rank by rank, positions follow one another.
        in_order = [row for micro in zip(*steps, strict=True) for batch in micro for row in _rows([batch])]
        assert in_order == _rows(plain.next_step())
        positions = [position for micro in zip(*steps, strict=True) for position in _positions(list(micro))]
        assert positions == list(range(number * GLOBAL_SIZE, (number + 1) * GLOBAL_SIZE))
    for loader in (plain, *loaders):
        loader.close()


def test_what_is_kept_of_samples_elsewhere_is_that_of_the_samples_read(stream: TokenStream) -> None:
    count = num_samples(stream.num_tokens, LENGTH)
    interleaving = WeightedInterleaving(["one", "other"], [1, 2])
    lengths = np.random.default_rng(0).integers(0, 9, count)
    orders = (SampleOrder(5, count), MixtureOrder(5, interleaving, [40, count - 40]))
    for order, of_samples in ((orders[0], lambda indices: lengths[list(indices)]), (orders[1], None)):
        for rank in range(2):
            loader = BatchLoader(
                _samples(stream),
                order,
                global_size=GLOBAL_SIZE,
                micro_size=3,
                dp_rank=rank,
                dp_degree=2,
                skipped=SkippedSamples([(5, 9)]),
                lengths=of_samples,
                beside=lambda indices: {"index": torch.tensor(indices)},
            )
            for _ in range(2 * count // GLOBAL_SIZE):
                for micro in loader.next_step():
                    own = _samples(stream).read("train", micro.beside["index"].tolist())
                    assert torch.equal(micro.samples["tokens"], own["tokens"])
            loader.close()
    assert _loader(stream, 0, 1, GLOBAL_SIZE).next_step()[0].beside == {}


def test_samples_are_skipped_alike_under_every_layout(stream: TokenStream) -> None:
    every = _loader(stream, 0, 1, 1)
    rows = [row for _ in range(8) for row in _rows(every.next_step())]
    skipped = SkippedSamples([(0, 3), (GLOBAL_SIZE, 2 * GLOBAL_SIZE), (100, 101)])
    left = [position for position in range(len(rows)) if position not in {0, 1, 2, *range(24, 48), 100}]
    remaining = [rows[position] for position in left]
    for degree, micro_size in ((1, 24), (2, 3), (3, 2)):
        # The second step, in a run that is continued after the first.
        loaders = [_loader(stream, rank, degree, micro_size, GLOBAL_SIZE, 1, skipped) for rank in range(degree)]
        for step in (1, 2, 3):
            steps = [loader.next_step() for loader in loaders]
            in_order = [row for micro in zip(*steps, strict=True) for batch in micro for row in _rows([batch])]
            here = slice(step * GLOBAL_SIZE, (step + 1) * GLOBAL_SIZE)
            assert in_order == remaining[here]
            assert [p for micro in zip(*steps, strict=True) for p in _positions(list(micro))] == left[here]
        for loader in loaders:
            loader.close()


@given(num_done=st.integers(0, 20), ahead=st.sampled_from([0, 1, 3]))
@settings(max_examples=15)
def test_a_loader_begins_exactly_where_another_stopped(stream: TokenStream, num_done: int, ahead: int) -> None:
    first = _loader(stream, 0, 2, 3)
    for _ in range(num_done):
        first.next_step()
    second = _loader(stream, 0, 2, 3, start=num_done * GLOBAL_SIZE, ahead=ahead)
    for _ in range(3):
        assert _rows(first.next_step()) == _rows(second.next_step())
    second.close()


def test_labels_are_the_tokens_that_follow(stream: TokenStream) -> None:
    batch = next_token_batch(_samples(stream).read("train", [0, 47, 48]))
    tokens = stream.read(0, stream.num_tokens)
    for row, index in enumerate((0, 47, 48)):
        start = index * LENGTH
        assert batch["input_ids"][row].tolist() == tokens[start : start + LENGTH].tolist()
        assert batch["labels"][row].tolist() == tokens[start + 1 : start + LENGTH + 1].tolist()
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_the_end_of_the_stream_is_masked(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 17, 1024)
    assert num_samples(17, LENGTH) == 3
    batch = next_token_batch(_samples(stream).read("train", [2]))
    tokens = stream.read(0, 17).tolist()
    # Tokens 14, 15, 16: two of them have one that follows.
    assert batch["labels"][0].tolist() == [*tokens[15:17], -100, -100, -100, -100, -100]
    assert batch["input_ids"][0, :3].tolist() == tokens[14:17]


def test_every_target_is_seen_once_in_an_epoch(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 100, 30)
    samples = _samples(stream)
    assert samples.num_samples("train") == num_samples(100, LENGTH)
    batch = next_token_batch(samples.read("train", list(range(samples.num_samples("train")))))
    targets = batch["labels"][batch["labels"] != -100]
    assert targets.tolist() == stream.read(1, 100).tolist()


def test_batches_share_no_memory(stream: TokenStream) -> None:
    loader = _loader(stream, 0, 1, GLOBAL_SIZE)
    (micro,) = loader.next_step()
    first = _batch(micro)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    first["labels"][:] = -100
    assert torch.equal(first["input_ids"], kept["input_ids"])
    (micro,) = loader.next_step()
    _batch(micro)["input_ids"][:] = 0
    assert torch.equal(first["input_ids"], kept["input_ids"])


@pytest.mark.parametrize(("degree", "micro_size", "limit"), [(1, 4, 0), (2, 4, 0), (3, 5, 0), (4, 50, 0), (2, 3, 10)])
def test_evaluation_reads_each_sequence_once_and_keeps_ranks_level(
    stream: TokenStream, degree: int, micro_size: int, limit: int
) -> None:
    shares = [
        list(
            evaluation_batches(
                _samples(stream),
                "validation",
                micro_size=micro_size,
                dp_rank=rank,
                dp_degree=degree,
                max_samples=limit,
            )
        )
        for rank in range(degree)
    ]
    assert len({len(share) for share in shares}) == 1
    in_order = [micro for group in zip(*shares, strict=True) for micro in group]
    targets = torch.cat([labels[labels != -100] for micro in in_order if len(labels := _batch(micro)["labels"])])
    stop = limit * LENGTH + 1 if limit else stream.num_tokens
    assert targets.tolist() == stream.read(1, stop).tolist()
    total = limit or num_samples(stream.num_tokens, LENGTH)
    assert [position for position in _positions(in_order) if position != FILLER] == list(range(total))


def test_nothing_held_out_is_nothing_to_evaluate(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 0, 1024)
    batches = evaluation_batches(_samples(stream), "validation", micro_size=2, dp_rank=0, dp_degree=2)
    assert list(batches) == []


def test_an_error_while_reading_ahead_reaches_the_training_thread(
    stream: TokenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> np.ndarray:
        raise OSError("the disk is gone")

    monkeypatch.setattr(SampleOrder, "indices", fail)
    loader = _loader(stream, 0, 1, GLOBAL_SIZE, ahead=2)
    with pytest.raises(OSError, match="the disk is gone"):
        loader.next_step()
    loader.close()


def test_closing_ends_the_thread(stream: TokenStream) -> None:
    before = threading.active_count()
    loader = _loader(stream, 0, 1, GLOBAL_SIZE, ahead=2)
    loader.next_step()
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before


def test_an_evaluation_without_a_held_out_sequence_is_refused(tmp_path: Path, config_file: Path) -> None:
    for name in ("few", "enough"):
        (tmp_path / name).mkdir()
    few, enough = (_samples(make_stream(tmp_path / name, size, 333)) for name, size in (("few", 1), ("enough", 2)))
    asked = load_config(config_file, ["evaluation.every_steps=2"])
    said = r"evaluation.every_steps=2 .* data.validation_fraction=0.2 holds out none of these; raise it"
    with pytest.raises(UserError, match=said):
        check_held_out(asked, few)
    check_held_out(asked, enough)
    check_held_out(load_config(config_file), few)
