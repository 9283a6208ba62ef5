"""Mixtures: exact proportions, a function of position alone, every source in epochs of its own."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.ranks.errors import UserError
from tests.support import shardline, tiny_values, trained, write_config, write_corpus
from trainer.attempt import check_continuation
from trainer.commands.show_data import main as show
from trainer.config import load_config, parse_config
from trainer.config.data import DataConfig
from trainer.data.documents import documents_in
from trainer.data.facts import SampleFacts
from trainer.data.identity import corpus_folder
from trainer.data.loader import BatchLoader, evaluation_batches
from trainer.data.mixture import MixtureOrder, WeightedInterleaving, integer_shares
from trainer.data.packed import PackedSamples
from trainer.data.prepare import prepare_corpus
from trainer.data.prepared import PreparedCorpus, PreparedMixture, describe_mixture, open_corpus
from trainer.data.samples import MicroBatch
from trainer.run_folder.folder import RunFolder
from trainer.tasks.next_tokens import next_token_batch

weights_lists = st.lists(
    st.one_of(st.integers(1, 50).map(float), st.floats(1e-3, 1e3).map(lambda x: round(x, 4))), min_size=1, max_size=12
)


def _interleaving(weights: list[float]) -> WeightedInterleaving:
    return WeightedInterleaving([f"s{number:02d}" for number in range(len(weights))], integer_shares(weights))


def _deviation_bound(weights: list[float]) -> float:
    return {1: 1e-9, 2: 0.5 + 1e-9, 3: 1.0}.get(len(weights), 1.7)


@given(weights=weights_lists)
@settings(max_examples=80)
def test_every_prefix_has_the_proportions_of_the_weights(weights: list[float]) -> None:
    num_positions = 1500
    sources, counts = _interleaving(weights).places(np.arange(num_positions))
    shares = np.array(weights) / sum(weights)
    taken = (sources[:, None] == np.arange(len(weights))).cumsum(axis=0)
    wanted = np.arange(1, num_positions + 1)[:, None] * shares
    assert np.abs(taken - wanted).max() <= _deviation_bound(weights)
    # The count before a position is what the source is at: none left out, none twice.
    for number in range(len(weights)):
        chosen = counts[sources == number]
        assert np.array_equal(chosen, np.arange(len(chosen)))


@given(weights=weights_lists, start=st.integers(0, 2**50), data=st.data())
@settings(max_examples=60)
def test_any_position_can_be_asked_for_first(weights: list[float], start: int, data: st.DataObject) -> None:
    positions = np.arange(start, start + 100)
    sources, counts = _interleaving(weights).places(positions)
    shuffled = np.array(data.draw(st.permutations(range(100))))
    again = _interleaving(weights).places(positions[shuffled])
    assert np.array_equal(sources[shuffled], again[0])
    assert np.array_equal(counts[shuffled], again[1])
    shares = np.array(integer_shares(weights), dtype=object)
    before = [int(counts[sources == number].min()) for number in np.unique(sources)]
    # Exact in integers, far from the beginning.
    for number, count in zip(np.unique(sources), before, strict=True):
        first = int(positions[sources == number].min())
        assert abs(count * sum(shares) - first * shares[number]) <= 1.7 * sum(shares)


@given(data=st.data())
@settings(max_examples=40)
def test_the_order_of_the_list_does_not_matter(data: st.DataObject) -> None:
    weights = data.draw(weights_lists)
    names = [f"s{number}" for number in range(len(weights))]
    permutation = data.draw(st.permutations(range(len(weights))))
    first = WeightedInterleaving(names, integer_shares(weights))
    second = WeightedInterleaving([names[i] for i in permutation], integer_shares([weights[i] for i in permutation]))
    sources, counts = first.places(np.arange(300))
    other_sources, other_counts = second.places(np.arange(300))
    assert [names[i] for i in sources] == [names[permutation[i]] for i in other_sources]
    assert np.array_equal(counts, other_counts)


def test_weights_are_taken_as_they_are_written() -> None:
    assert integer_shares([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert integer_shares([3.0, 1.0]) == [3, 1]
    assert integer_shares([1e-3, 2.5]) == [1, 2500]
    # A total beyond 2**31 is counted in Python's integers.
    weights = [0.123456789012, 0.876543210988]
    sources, _ = _interleaving(weights).places(np.arange(10**6, 10**6 + 1000))
    assert abs((sources == 0).sum() - 123.456789) <= 1


@given(
    weights=st.lists(st.integers(1, 9).map(float), min_size=1, max_size=5),
    data=st.data(),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)
@settings(max_examples=60)
def test_each_source_is_seen_once_in_each_of_its_epochs(
    weights: list[float], data: st.DataObject, seed: int, shuffle: bool
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=len(weights), max_size=len(weights)))
    order = MixtureOrder(seed, _interleaving(weights), sizes, shuffle)
    positions = np.arange(1200)
    indices, epochs = order.indices(positions), order.epochs(positions)
    bounds = np.cumsum([0, *sizes])
    for number, size in enumerate(sizes):
        of_source = (indices >= bounds[number]) & (indices < bounds[number + 1])
        local, source_epochs = indices[of_source] - bounds[number], epochs[of_source]
        assert np.array_equal(source_epochs, np.arange(len(local)) // size)
        for epoch in range(len(local) // size):
            seen = local[source_epochs == epoch]
            assert np.array_equal(np.sort(seen), np.arange(size))
            assert shuffle or np.array_equal(seen, np.arange(size))


# From here on with real corpora.


def _mixture_settings(root: Path) -> dict[str, Any]:
    with (root / "lines.jsonl").open("w") as file:
        for number in range(150):
            file.write(json.dumps({"body": f"line {number} " * (3 + number % 11)}) + "\n")
    return {
        "mixture": [
            {"name": "files", "weight": 0.75, "source": "text", "paths": [str(write_corpus(root / "documents"))]},
            {
                "name": "lines",
                "weight": 0.25,
                "source": "jsonl",
                "paths": [str(root / "lines.jsonl")],
                "text_field": "body",
            },
        ],
        "vocab_size": 301,
        "sequence_length": 32,
        "validation_fraction": 0.2,
    }


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, PreparedMixture]:
    root = tmp_path_factory.mktemp("mixture")
    config = DataConfig.model_validate(_mixture_settings(root) | {"cache_dir": str(root / "cache")})
    prepared = prepare_corpus(config, progress=False)
    assert isinstance(prepared, PreparedMixture)
    return config, prepared


def _samples(mixture: PreparedMixture) -> PackedSamples:
    return PackedSamples(mixture.stream, SampleFacts(32))


def _loader(
    mixture: PreparedMixture, rank: int, degree: int, micro: int, size: int = 24, start: int = 0
) -> BatchLoader:
    return BatchLoader(
        _samples(mixture),
        mixture.order(7, DataConfig(sequence_length=32)),
        global_size=size,
        micro_size=micro,
        dp_rank=rank,
        dp_degree=degree,
        start_sample=start,
        prefetch_steps=0,
    )


def _rows(batches: list[MicroBatch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.samples["tokens"][:, :-1].tolist()]


@given(layout=st.sampled_from([(1, 24), (2, 3), (3, 4), (4, 6), (24, 1)]), size=st.sampled_from([24, 48, 72]))
@settings(max_examples=10)
def test_ranks_and_batch_sizes_do_not_change_the_sequence_at_a_position(
    mixture: tuple[DataConfig, PreparedMixture], layout: tuple[int, int], size: int
) -> None:
    degree, micro = layout
    one = _loader(mixture[1], 0, 1, 1, size=144)
    expected = _rows(one.next_step())
    loaders = [_loader(mixture[1], rank, degree, micro, size) for rank in range(degree)]
    found: list[list[int]] = []
    while len(found) < 144:
        steps = [loader.next_step() for loader in loaders]
        found += [row for micro_batches in zip(*steps, strict=True) for row in _rows(list(micro_batches))]
    assert found == expected


@given(start=st.integers(0, 10_000))
@settings(max_examples=10)
def test_a_mixture_continues_at_any_position(mixture: tuple[DataConfig, PreparedMixture], start: int) -> None:
    indices = mixture[1].order(7, DataConfig(sequence_length=32)).indices(np.arange(start, start + 24))
    stream = mixture[1].stream("train")
    places = [stream.locate(index, 32) for index in indices]
    expected = [source.read(i * 32, min(i * 32 + 32, source.num_tokens)).tolist() for source, i in places]
    found = _rows(_loader(mixture[1], 0, 1, 24, start=start).next_step())
    # The last sequence of a source may be short.
    assert [row[: len(want)] for row, want in zip(found, expected, strict=True)] == expected


def test_one_tokenizer_is_trained_on_all_sources(mixture: tuple[DataConfig, PreparedMixture]) -> None:
    files, lines = mixture[1].corpora
    assert files.manifest.tokenizer_sha256 == lines.manifest.tokenizer_sha256
    alone = mixture[0].mixture[1].model_dump(exclude={"name", "weight"})
    config = mixture[0].model_copy(update={"mixture": (), **alone})
    trained_alone = prepare_corpus(config, progress=False)
    assert isinstance(trained_alone, PreparedCorpus)
    assert trained_alone.manifest.tokenizer_sha256 != lines.manifest.tokenizer_sha256
    assert trained_alone.manifest.corpus_sha256 == lines.manifest.corpus_sha256


def test_all_held_out_documents_are_evaluated(mixture: tuple[DataConfig, PreparedMixture]) -> None:
    samples = _samples(mixture[1])
    options: dict[str, Any] = {"split": "validation", "micro_size": 2, "dp_degree": 2}
    shares = [list(evaluation_batches(samples, dp_rank=rank, **options)) for rank in range(2)]
    batches = [next_token_batch(micro.samples, micro.positions) for share in shares for micro in share]
    num_targets = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert num_targets == sum(corpus.stream("validation").num_tokens - 1 for corpus in mixture[1].corpora)
    limited = list(evaluation_batches(samples, dp_rank=0, max_samples=6, spread=True, **(options | {"dp_degree": 1})))
    first_of_each = [corpus.stream("validation").read(0, 32).tolist() for corpus in mixture[1].corpora]
    assert _rows(limited)[0] == first_of_each[0]
    lines = mixture[1].corpora[1].stream("validation")
    whole_lines = [lines.read(i * 32, i * 32 + 32).tolist() for i in range(lines.num_tokens // 32)]
    assert any(row in whole_lines for row in _rows(limited))


def test_the_fingerprint_covers_sources_and_weights(mixture: tuple[DataConfig, PreparedMixture]) -> None:
    config, prepared = mixture

    def changed(**update: Any) -> DataConfig:
        sources = (config.mixture[0].model_copy(update=update), config.mixture[1])
        return config.model_copy(update={"mixture": sources})

    # Weights belong to the run: nothing is prepared anew, and yet it is another mixture.
    heavier = changed(weight=0.5)
    assert corpus_folder(heavier) == corpus_folder(config)
    assert PreparedMixture(prepared.folder, heavier).fingerprint != prepared.fingerprint
    assert corpus_folder(changed(max_documents=5)) != corpus_folder(config)
    tripled = changed(weight=3.0)
    same = tripled.model_copy(
        update={"mixture": (tripled.mixture[0], tripled.mixture[1].model_copy(update={"weight": 1.0}))}
    )
    assert PreparedMixture(prepared.folder, same).fingerprint == prepared.fingerprint
    assert "files 0.75 of the samples" in describe_mixture(prepared, 32, 100)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": ["x"], "mixture": [{"name": "a", "weight": 1}]}, "data.paths has no effect beside data.mixture"),
        ({"mixture": [{"name": "a", "weight": 0.0}]}, r"data.mixture.0.weight=0.0: input should be greater than 0"),
        ({"mixture": [{"name": "a", "weight": 1, "wieght": 1}]}, r"did you mean data.mixture.0.weight\?"),
        ({"mixture": [{"name": "a", "weight": 1}] * 2}, "2 sources named a"),
        ({"mixture": [{"name": "a", "weight": 1, "source": "text"}]}, "data.mixture a.source=text needs"),
        (
            {"mixture": [{"name": "a", "weight": 1, "source": "text", "paths": ["/nowhere"]}]},
            "data.mixture a: data.paths: /nowhere names no file",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = tiny_values(tmp_path, tmp_path / "cache", tmp_path)
    values["data"] = {"cache_dir": str(tmp_path / "cache")} | change
    with pytest.raises(UserError, match=message):
        prepare_corpus(parse_config(values, "test").data, progress=False)


@pytest.mark.timeout(400)
def test_a_run_on_a_mixture_says_what_a_step_trained_on(tmp_path: Path) -> None:
    values = tiny_values(tmp_path / "runs", tmp_path / "cache", tmp_path)
    values["data"] = _mixture_settings(tmp_path) | {"cache_dir": str(tmp_path / "cache")}
    values |= {"steps": 3, "data": values["data"]}
    config = write_config(tmp_path / "mixture.yaml", values)
    finished = shardline("run", config, "--nproc-per-node", 2)
    trained(finished)
    assert "mixture: files 0.75 of the samples" in finished.stdout
    output = io.StringIO()
    with redirect_stdout(output):
        assert show([str(tmp_path / "runs" / "tiny"), "--step", "2"]) == 0
    titles = [line for line in output.getvalue().splitlines() if line.startswith("step 2, sample")]
    assert len(titles) == 12
    assert sum("source files, epoch 0" in title for title in titles) == 9
    assert sum("source lines, epoch 0" in title for title in titles) == 3
    assert "lines.jsonl#" in output.getvalue()
    # The audit of samples that are skipped names the same documents.
    frozen = RunFolder(tmp_path / "runs" / "tiny").frozen_config()
    documents = documents_in(frozen, open_corpus(frozen, None), [(12, 20), (20, 24)])
    assert {document["source"] for document in documents} == {"files", "lines"}
    shown = {line.split("  tokens ")[0].strip() for line in output.getvalue().splitlines() if "  tokens " in line}
    assert {document["id"] for document in documents} == shown
    # Another weight is another run.
    values["data"]["mixture"][0]["weight"] = 0.5
    write_config(tmp_path / "mixture.yaml", values)
    with pytest.raises(UserError, match=r"data\.mixture"):
        check_continuation(RunFolder(tmp_path / "runs" / "tiny"), load_config(config, ["steps=5"]))
