"""What is wrong with a run is found out before its corpus is read, whoever starts its ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sharding.ranks.errors import UserError
from tests.support import refused, run_module
from trainer.config import load_config
from trainer.config.rules import World
from trainer.data.prepare_stages import prepare_run, refuse_single_document
from trainer.plan.preview import preview

MakeConfig = Callable[..., Path]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.config.hidden_act=swiglu", "a llama with model.attention=sdpa cannot be built: KeyError: 'swiglu'"),
        ("checkpoint.from=/nowhere", "checkpoint.from=/nowhere: /nowhere has no checkpoint"),
    ],
)
def test_a_bare_rank_prepares_nothing_for_what_cannot_run(
    override: str, words: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    config = make_config("bare", data={"cache_dir": str(cache)})
    refused(run_module("trainer", config, "batch.micro_size=12", override), words)
    assert not cache.exists()


def test_one_text_file_cannot_be_divided(make_config: MakeConfig, tmp_path: Path) -> None:
    file, cache = tmp_path / "all.txt", tmp_path / "cache"
    file.write_text("def add(a, b):\n    return a + b\n" * 500)
    data = {"cache_dir": str(cache), "paths": [str(file)]}
    config = load_config(make_config("one", data=data, evaluation={"every_steps": 2}))
    said = r"evaluation\.every_steps=2 .*data\.paths names \S+all\.txt alone, and a text file is one document"
    for check in (prepare_run, lambda one: preview(one, World(1, has_gpu=False))):
        with pytest.raises(UserError, match=said):
            check(config)
    assert not cache.exists()
    # Where nothing is to be evaluated it is trained on, and what is prepared is not refused any more.
    unevaluated = load_config(make_config("one", data=data, evaluation={"every_steps": 0}))
    (prepared,) = prepare_run(unevaluated, progress=False)
    file.unlink()
    refuse_single_document(config, prepared.corpus.fingerprint)
