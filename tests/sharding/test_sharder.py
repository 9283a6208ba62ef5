"""What ``fully_shard`` gathers together, for how long, and how it travels on gloo."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from sharding.blocks import ends_of_language_model, find_blocks
from sharding.ranks.process_group import Ranks
from sharding.slice_collectives import SliceAllGather, SliceReduceScatter
from tests.sharding.engine_cases import FACTS, num_targets, random_batch, tiny_config, tiny_engine
from tests.support import TINY_MODEL, run_on_ranks
from trainer.model.models import build_model_on_meta
from trainer.tasks.registry import build_task

_UNTIED = TINY_MODEL | {"config": TINY_MODEL["config"] | {"tie_word_embeddings": False}}
_GPT2 = {"architecture": "gpt2", "config": {"n_embd": 32, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False}}
# Its final norm stands before its blocks.
_OPT = {
    "architecture": "opt",
    "config": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
    },
}


def _ends(model: nn.Module) -> tuple[str | None, list[str]]:
    embedding, last = ends_of_language_model(model, [block for _, block in find_blocks(model)])
    names = {id(module): name for name, module in model.named_modules()}
    return None if embedding is None else names[id(embedding)], [names[id(module)] for module in last]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (_UNTIED, ("model.embed_tokens", ["model.norm", "lm_head"])),
        (_GPT2, ("transformer.wte", ["transformer.ln_f", "lm_head"])),
        (_OPT, ("model.decoder.embed_tokens", ["lm_head"])),
        (TINY_MODEL, (None, [])),
    ],
)
def test_the_ends_of_a_language_model_are_found(model: dict[str, Any], expected: tuple[str | None, list[str]]) -> None:
    built = build_model_on_meta(build_task("causal-lm"), tiny_config({}, model=model).model, FACTS)
    assert _ends(built) == expected


def test_a_model_that_does_not_say_so_has_no_ends() -> None:
    network = nn.Sequential(nn.Embedding(7, 4), nn.ModuleList([nn.Linear(4, 4)]), nn.LayerNorm(4), nn.Linear(4, 7))
    assert _ends(network) == (None, [])


def _gathered(model: nn.Module) -> set[str]:
    names = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}
    names |= {f"model.layers.{index}": str(index) for index in range(3)}
    whole = {name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)}
    return {short for prefix, short in names.items() if any(name.startswith(prefix) for name in whole)}


def _held_for_sums(model: Any) -> list[object]:
    context = model._get_fsdp_state()._comm_ctx
    # Its names in torch 2.13 and before; neither is there before the first pass.
    return [*getattr(context, "reduce_scatter_states", []), getattr(context, "reduce_scatter_state", None)]


def _watch_gathering(ranks: Ranks) -> None:
    all_of_it = {"embedding", "norm", "head", "0", "1", "2"}
    batches = [random_batch(index) for index in range(2)]
    for strategy, chunk in (("zero2", 0), ("zero3", 0), ("zero3", 5)):
        engine: Any = tiny_engine(ranks, strategy, model=_UNTIED, task={"loss_chunk_tokens": chunk})
        model, loss = engine._model, engine._loss
        before, after = [], []

        def watched(model: nn.Module, batch: Any, loss: Any = loss, before: Any = before, after: Any = after) -> Any:
            before.append(_gathered(model))
            assert not any(_held_for_sums(model))
            value = loss(model, batch)
            after.append(_gathered(model))
            return value

        engine._loss = watched
        for _ in range(2):
            engine.train_batch(batches, num_targets(batches, ranks.world_size))
            assert _gathered(model) == set()
            engine.step(1e-2)
            engine.evaluate(batches)
            assert _gathered(model) == set()
        if strategy == "zero2":
            assert before == [set(), all_of_it] * 2
            assert after == [all_of_it] * 4
        else:
            # The embedding is gone, and so is a block but the last; this one is gone by the next micro-batch.
            assert before == [set(), {"norm", "head"}] * 2
            assert after == [{"norm", "head", "2"}] * 4


def _exchange_slices(ranks: Ranks) -> None:
    world_size, group = ranks.world_size, dist.group.WORLD
    assert group is not None
    flat = torch.arange(4.0 * world_size) + 100 * ranks.rank
    own = torch.empty(4)
    SliceReduceScatter()(own, flat, group, dist.ReduceOp.SUM)
    total = torch.arange(4.0 * world_size) * world_size + 100 * sum(range(world_size))
    assert torch.equal(own, total[4 * ranks.rank :][:4])
    whole = torch.full((4 * world_size,), -1.0)
    place = whole[4 * ranks.rank :][:4].copy_(own)
    assert SliceAllGather()(whole, place, group).wait()
    assert torch.equal(whole, total)
    with pytest.raises(ValueError, match="slices are summed"):
        SliceReduceScatter()(own, flat, group, dist.ReduceOp.AVG)


def _all(ranks: Ranks) -> None:
    _exchange_slices(ranks)
    _watch_gathering(ranks)


def test_what_backward_needs_first_stays_gathered_and_nothing_else() -> None:
    run_on_ranks(_all, 2)


def test_slices_are_exchanged_among_more_than_two_ranks() -> None:
    run_on_ranks(_exchange_slices, 3)
