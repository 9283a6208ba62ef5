"""A model that sees the next token is refused, whoever built it and under whatever engine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from sharding.mesh import build_mesh
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import FACTS, NUM_TOKENS, tiny_config
from tests.support import TINY_MODEL, run_on_ranks
from trainer.model.causality import check_causality
from trainer.model.engine import build_model_engine
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.registry import build_task

_SIZES = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4}


class _Mean(nn.Module):
    """Each token's logits are a function of the mean over the whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(301, 8)
        self.head = nn.Linear(8, 301)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.embedding(input_ids)
        return SimpleNamespace(logits=self.head(hidden + hidden.mean(dim=1, keepdim=True)))


class _OwnModel(CausalLanguageModelling):
    def build_model(self, model_settings: Any, facts: Any) -> nn.Module:
        return _Mean()


def _check(ranks: Ranks, parallel: dict[str, Any], model: dict[str, Any], task: Any = None, **sections: Any) -> None:
    config = tiny_config(parallel, model=model, **sections)
    task = task or build_task("causal-lm", loss_chunk_tokens=config.task.loss_chunk_tokens)
    engine, _ = build_model_engine(config, task, build_mesh(config.parallel, ranks), ranks, FACTS)
    check_causality(engine, config, FACTS, ranks)


def _cases(ranks: Ranks, folder: Path) -> None:
    bert = {"architecture": "bert", "config": _SIZES}
    decoder = {"architecture": "bert", "config": _SIZES | {"is_decoder": True}}
    mixtral = {"architecture": "mixtral", "config": _SIZES | _EXPERTS}
    ddp, masked = {"strategy": "ddp"}, {"data": {"sequence_length": 16, "document_mask": True}}
    for parallel in (ddp, {"strategy": "zero3"}, {"strategy": "zero2", "backend": "deepspeed"}):
        with pytest.raises(UserError, match=r"^bert sees the tokens .* from 8 on .*set model\.config\.is_decoder=true"):
            _check(ranks, parallel, bert)
        _check(ranks, parallel, decoder)
    for compute in ("fp32", "bf16"):
        _check(ranks, ddp, mixtral, precision={"compute": compute}, batch={"global_size": 12, "micro_size": 3})
        with pytest.raises(UserError, match="sees the tokens"):
            _check(ranks, ddp, bert, precision={"compute": compute})
    _check(ranks, ddp, TINY_MODEL, task=build_task("causal-lm", loss_chunk_tokens=4), **masked)
    with pytest.raises(UserError, match="sees the tokens"):
        _check(ranks, ddp, bert, **masked)
    with pytest.raises(UserError, match="sees the tokens"):
        _check(ranks, ddp, bert, data={"sequence_length": 2})
    _check(ranks, ddp, decoder, data={"sequence_length": 2})
    with pytest.raises(UserError, match=r"sees the tokens .*choose a causal architecture"):
        _check(ranks, ddp, TINY_MODEL, task=_OwnModel())
    with pytest.raises(UserError, match=r"is_decoder to true in the config\.json of "):
        _check(ranks, ddp, {"pretrained": str(folder)})


@pytest.mark.timeout(200)
def test_a_model_that_sees_the_next_token_is_refused(tmp_path: Path) -> None:
    BertLMHeadModel(BertConfig(**_SIZES, vocab_size=NUM_TOKENS)).save_pretrained(tmp_path)
    run_on_ranks(_cases, 2, tmp_path, timeout_s=180)
