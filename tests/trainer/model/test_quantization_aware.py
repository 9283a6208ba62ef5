"""Training with weights that are rounded in each pass: by a formula written down here, and under every engine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sharding.ranks.errors import UserError
from tests.sharding.engine_cases import FACTS
from tests.support import TINY_MODEL
from trainer.config import RunConfig, parse_config
from trainer.config.sections import ModelConfig
from trainer.model.models import build_model_on_meta
from trainer.model.quantization_aware import make_aware, rounded
from trainer.parity.comparison import parity_cases, run_parity
from trainer.tasks.registry import build_task

_AWARE = ModelConfig(**TINY_MODEL, quantize_aware="int4-weight")


def test_weights_are_rounded_as_the_kernels_of_onnx_runtime_read_them() -> None:
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    torch.manual_seed(0)
    # A row whose last block is not whole, and one of zeros.
    weight = torch.randn(6, 70)
    weight[3, 32:64] = 0.0
    columns = np.pad(weight.numpy().T, ((0, 26), (0, 0))).copy()
    packed, scales = np.zeros((6, 3, 16), dtype=np.uint8), np.zeros((6, 3), dtype=np.float32)
    quantize_matmul_4bits(packed, columns, scales, np.zeros((6, 2), dtype=np.uint8), 32, 6, 70, True)
    steps = np.stack([packed & 15, packed >> 4], axis=-1).reshape(6, 3, 32).astype(np.float32) - 8
    stored = (steps * scales[..., None]).reshape(6, -1)[:, :70]
    assert np.array_equal(rounded(weight).numpy(), stored)
    assert np.abs(stored - weight.numpy()).max() > 0.1


def test_gradients_pass_and_parameters_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    before, inputs = dict(model.named_parameters()), torch.randn(5, 40)
    assert make_aware(model, _AWARE).startswith("weights of 2 linear layers are rounded")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is tensor for name, tensor in before.items())
    made = model[0](inputs)
    assert torch.equal(made, nn.functional.linear(inputs, rounded(before["0.weight"]), before["0.bias"]))
    made.sum().backward()
    assert torch.allclose(before["0.weight"].grad, inputs.sum(0).expand(8, 40), atol=1e-5)


def test_shared_and_frozen_weights_stay_so() -> None:
    settings = ModelConfig(**TINY_MODEL, freeze=("model.layers.0.*",), quantize_aware="int4-weight")
    model: Any = build_model_on_meta(build_task("causal-lm"), settings, FACTS)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert "22 linear layers" in make_aware(model, settings)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen
    gpt2 = ModelConfig(architecture="gpt2", config={"n_embd": 32, "n_layer": 1, "n_head": 2})
    with pytest.raises(UserError, match="this GPT2LMHeadModel multiplies by those of Conv1D as well"):
        make_aware(build_model_on_meta(build_task("causal-lm"), gpt2, FACTS), _AWARE)
    with pytest.raises(UserError, match="this Embedding has none"):
        make_aware(nn.Embedding(3, 2), _AWARE)


def _parsed(**sections: Any) -> RunConfig:
    model = {"builtin": "mlp", "arguments": {"hidden_sizes": [40]}, "quantize_aware": "int4-weight"}
    values = {"steps": 4, "task": {"name": "image-classification"}, "model": model, "optimizer": {"lr": 1e-2}}
    return parse_config(values | sections, "test")


def test_what_it_was_not_proven_with_is_refused() -> None:
    for section, setting in (
        ({"parallel": {"backend": "deepspeed", "strategy": "zero1"}}, "parallel.backend=torch or bucketed"),
        ({"compile": {"enabled": True}}, "compile.enabled=false"),
        ({"precision": {"compute": "fp8"}}, "precision.compute=auto, fp32, bf16 or fp16"),
    ):
        with pytest.raises(UserError, match=rf"model\.quantize_aware=int4-weight goes with {setting}"):
            _parsed(data={"source": "digits"}, **section)


@pytest.mark.timeout(300)
def test_every_engine_trains_as_one_plain_process(tmp_path: Path) -> None:
    config = _parsed(data={"source": "digits", "cache_dir": str(tmp_path / "cache")})
    cases = [case for case in parity_cases([2], ()) if case.backend in ("torch", "bucketed")]
    cases = [case for case in cases if case.accumulation_steps > 1]
    assert len(cases) == 7
    (tmp_path / "work").mkdir()
    rows = run_parity(config, cases, tmp_path / "work")
    assert [row for row in rows if not row.passed] == []
