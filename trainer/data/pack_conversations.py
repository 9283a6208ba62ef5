"""Packing of conversations: which token is a target, and which of them share a sample."""

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig
from trainer.data.chat_template import ChatTemplate
from trainer.data.clean import CleanedCorpus
from trainer.data.corpus_manifest import ConversationFacts
from trainer.data.pack import ShardWriter
from trainer.data.progress import StageProgress
from trainer.data.shards import TARGET_BIT, SplitFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONVERSATION_DTYPE = "<u4"
"""A stored token of a conversation: its id and ``TARGET_BIT``."""

_BATCH_CONVERSATIONS = 256
_MAX_NAMED = 20


@dataclass
class _Outcome:
    """What becomes of the conversations of a source, by where they came from."""

    cut: list[str] = field(default_factory=list)
    without_target: list[str] = field(default_factory=list)
    divided: list[str] = field(default_factory=list)
    targets_by_file: Counter[str] = field(default_factory=Counter)
    targets_by_split: dict[str, int] = field(default_factory=dict)


@dataclass
class _EncodedSplit:
    """The conversations of a split as stored tokens, one behind the other in a file."""

    spool: Path
    lengths: list[int] = field(default_factory=list)
    source_ids: list[str] = field(default_factory=list)


def pack_conversations(
    config: DataConfig,
    cleaned: CleanedCorpus,
    tokenizer: "PreTrainedTokenizerFast",
    template: ChatTemplate,
    folder: Path,
    stages: StageProgress,
) -> tuple[dict[str, SplitFacts], ConversationFacts]:
    """Tokenise the conversations of a source and write the shards of its splits.

    Args:
        config: the section ``data``.
        cleaned: the conversations.
        tokenizer: what fills samples up is its padding token, or its end of text.
        template: what writes them.
        folder: where the files go.
        stages: shows progress, and what was cut or dropped.

    Raises:
        UserError: the template refuses a conversation, or all of a file are without a target.
    """
    outcome = _Outcome()
    row_tokens = config.sequence_length if config.packs_whole else None
    encoded = {
        split: _encode(split, cleaned, template, row_tokens, folder, outcome, stages)
        for split in ("train", "validation")
    }
    _check_targets(outcome, row_tokens)
    if template.writes_dates:
        stages.note("the chat template writes the date of this day: prepared on another one, tokens are others")
    _say(outcome, row_tokens, stages)
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    splits = {}
    for split, conversations in encoded.items():
        splits[split] = _write(split, conversations, row_tokens, filler, config.shard_tokens, folder)
        conversations.spool.unlink()
    facts = ConversationFacts(
        row_tokens=row_tokens,
        num_targets=outcome.targets_by_split,
        num_cut=len(outcome.cut),
        num_without_target=len(outcome.without_target),
        num_divided=len(outcome.divided),
    )
    return splits, facts


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Put what has these lengths into as few bins as best fit decreasing finds, always the same ones.

    The longest comes first, each into the fullest bin that has room for it (Johnson, "Near-optimal bin packing
    algorithms", 1973: at most 11/9 of the least possible number of bins, and 6/9 of a bin).

    Args:
        lengths: from 1 to the capacity.
        capacity: of a bin.

    Returns:
        Indices of what is in each bin, ascending; bins are in the order of what is first in them.
    """
    bins: list[list[int]] = []
    # By the room that is left. Which rooms there are is a bit each of one number, whose lowest bit is quickly found.
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        left = room - length
        if left:
            by_room[left].append(number)
            rooms |= 1 << left
    return sorted(sorted(indices) for indices in bins)


def _encode(
    split: str,
    cleaned: CleanedCorpus,
    template: ChatTemplate,
    row_tokens: int | None,
    folder: Path,
    outcome: _Outcome,
    stages: StageProgress,
) -> _EncodedSplit:
    """Tokenise the conversations of a split, cut to a row."""
    encoded = _EncodedSplit(folder / f"{split}-conversations.spool")
    num_targets = 0
    with (
        encoded.spool.open("wb") as spool,
        stages.stage(f"tokenising {split}", cleaned.num_documents(split)) as advance,
    ):
        conversations = cleaned.contents(split)
        while batch := list(itertools.islice(conversations, _BATCH_CONVERSATIONS)):
            rendered, owners = [], []
            for contents, source_id in batch:
                parts = template.render(json.loads(contents), source_id)
                rendered += parts
                owners += [source_id] * len(parts)
                outcome.targets_by_file[_file_of(source_id)] += 0
                if len(parts) > 1:
                    outcome.divided.append(source_id)
                if not parts:
                    outcome.without_target.append(source_id)
            for source_id, (ids, is_target) in zip(owners, template.encode(rendered), strict=True):
                # Nothing is before the first token that it could be predicted from.
                is_target[:1] = False
                if row_tokens is not None and len(ids) > row_tokens:
                    outcome.cut.append(source_id)
                    ids, is_target = ids[:row_tokens], is_target[:row_tokens]
                if not is_target.any():
                    outcome.without_target.append(source_id)
                    continue
                num_targets += int(is_target.sum())
                outcome.targets_by_file[_file_of(source_id)] += int(is_target.sum())
                spool.write((ids.astype(CONVERSATION_DTYPE) | is_target * TARGET_BIT).tobytes())
                encoded.lengths.append(len(ids))
                encoded.source_ids.append(source_id)
            advance(len(batch))
    outcome.targets_by_split[split] = num_targets
    return encoded


def _write(
    split: str, encoded: _EncodedSplit, row_tokens: int | None, filler: int, shard_tokens: int, folder: Path
) -> SplitFacts:
    """Write the shards of a split, row by row where conversations are packed whole."""
    writer = ShardWriter(folder, split, CONVERSATION_DTYPE, shard_tokens, has_targets=True)
    number = len(encoded.lengths)
    if row_tokens is None:
        rows = [[index] for index in range(number)]
    else:
        rows = best_fit_decreasing(encoded.lengths, row_tokens)
    bounds = np.cumsum([0, *encoded.lengths])
    tokens = np.memmap(encoded.spool, dtype=CONVERSATION_DTYPE, mode="r") if number else np.zeros(0, CONVERSATION_DTYPE)
    starts: list[int] = [0]
    sources: list[bytes] = []
    for row in rows:
        for index in row:
            if sources:
                starts.append(writer.num_tokens)
            writer.write(tokens[bounds[index] : bounds[index + 1]])
            sources.append(encoded.source_ids[index].encode())
        if row_tokens is not None and (left := -writer.num_tokens % row_tokens):
            # It belongs to the last conversation: none of its tokens is a target.
            writer.write(np.full(left, filler, dtype=CONVERSATION_DTYPE))
    if sources:
        starts.append(writer.num_tokens)
    return writer.close(starts, sources)


def _check_targets(outcome: _Outcome, row_tokens: int | None) -> None:
    for file, num_targets in outcome.targets_by_file.items():
        if not num_targets:
            within = "" if row_tokens is None else f" within the first data.sequence_length={row_tokens} tokens"
            raise UserError(
                f"data.paths: {file} has no target: in none of its conversations the assistant says anything{within}; "
                "remove it, or check the roles in it."
            )
    if not outcome.targets_by_split["train"]:
        raise UserError(
            "data.validation_fraction: no conversation with a target is left to train on; lower it, or add some."
        )


def _say(outcome: _Outcome, row_tokens: int | None, stages: StageProgress) -> None:
    for source_ids, what in (
        (outcome.cut, f"are longer than data.sequence_length={row_tokens} tokens and cut"),
        (outcome.without_target, "have no target and are dropped"),
        (outcome.divided, "are divided, since the chat template writes earlier turns otherwise once another follows"),
    ):
        if source_ids:
            more = f" and {len(source_ids) - _MAX_NAMED:,} more" if len(source_ids) > _MAX_NAMED else ""
            stages.note(f"{len(source_ids):,} conversations {what}: {', '.join(source_ids[:_MAX_NAMED])}{more}")


def _file_of(source_id: str) -> str:
    return source_id.rpartition("#")[0]
