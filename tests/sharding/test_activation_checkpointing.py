"""What of a block is kept for backward, and what is computed once more, operator by operator."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sharding.activation_checkpointing import _kind, checkpoint_activations, keep_within_budget
from sharding.config import ActivationCheckpointingConfig

# What the compiler loads warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
_WIDTH, _LENGTH = 32, 16


class _Block(nn.Module):
    """Two products in a row, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            hidden = hidden + self.down(functional.silu(self.up(self.norm(hidden))).tanh())
        return hidden


class _Attention(nn.Module):
    """Scores, and what they weigh."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return (torch.softmax(hidden @ hidden.transpose(-1, -2), -1) @ hidden).tanh()


class _Count(TorchDispatchMode):
    """Counts operators that are carried out, by the last dim of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim:
            self.seen[operator.name(), result.shape[-1]] += 1
        return result


def _run(
    build: Callable[[], nn.Module], *, is_compiled: bool = False, **settings: Any
) -> tuple[list[torch.Tensor], int, Counter[tuple[str, int]]]:
    """One pass of a block; returns all gradients, the bytes that autograd kept, and what ran uncompiled."""
    torch.manual_seed(0)
    block, config = build(), ActivationCheckpointingConfig(**settings)
    checkpoint_activations(block, 0, config)
    if is_compiled:
        torch._dynamo.reset()
        block.compile(backend="aot_eager_decomp_partition")
        keep_within_budget(block, config)
    hidden = torch.randn(4, _LENGTH, _WIDTH, requires_grad=True)
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    count = _Count()
    # Nothing is compiled under such a mode.
    with nullcontext() if is_compiled else count:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = block(hidden)
        result.square().sum().backward()
    leaves = [hidden, *block.parameters()]
    return [leaf.grad for leaf in leaves if leaf.grad is not None], sum(kept.values()), count.seen


def _assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for gradient, other in zip(found, expected, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-5, atol=1e-5)


def test_a_budget_is_a_share_of_what_a_compiled_block_keeps() -> None:
    expected, _, _ = _run(_Block)
    kept = {}
    for budget in (1.0, 0.5, 0.0):
        gradients, kept[budget], _ = _run(_Block, is_compiled=True, mode="budget", memory_budget=budget)
        _assert_close(gradients, expected)
    # Of a block that is compiled after them, without a budget.
    gradients, whole, _ = _run(_Block, is_compiled=True)
    _assert_close(gradients, expected)
    num_input_bytes = 4 * 4 * _LENGTH * _WIDTH
    assert num_input_bytes == kept[0.0] < kept[0.5] <= num_input_bytes + whole / 2, (kept, whole)
    assert kept[1.0] == whole > 4 * num_input_bytes


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("build", [_Block, _Attention])
def test_gradients_of_recomputed_blocks_are_equal(build: Callable[[], nn.Module], is_compiled: bool) -> None:
    expected, _, _ = _run(build)
    for mode in ("full", "selective"):
        gradients, _, _ = _run(build, is_compiled=is_compiled, mode=mode)
        if is_compiled:
            _assert_close(gradients, expected)
        else:
            assert all(map(torch.equal, gradients, expected)), mode


def test_selective_keeps_every_second_product_and_what_attention_weighs() -> None:
    # What is computed once more, by its last dim. Backward needs nothing of the last product of a block.
    for build, operator, full, selective in (
        (_Block, "aten::addmm", {4 * _WIDTH: 2, _WIDTH: 1}, {4 * _WIDTH: 0, _WIDTH: 1}),
        (_Attention, "aten::bmm", {_LENGTH: 1, _WIDTH: 1}, {_LENGTH: 1, _WIDTH: 0}),
    ):
        once, *others = (_run(build, mode=mode)[2] for mode in ("none", "full", "selective"))
        for found, expected in zip(others, (full, selective), strict=True):
            assert {dim: found[operator, dim] - once[operator, dim] for dim in expected} == expected, operator


def test_operators_are_known_by_name() -> None:
    aten = torch.ops.aten
    attention = (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._flash_attention_forward.default,
        aten._efficient_attention_forward.default,
        torch.ops.higher_order.flex_attention,
    )
    assert {_kind(operator) for operator in attention} == {"attention"}
    assert {_kind(op.default) for op in (aten.mm, aten.addmm, aten._scaled_mm)} == {"product"}
    assert {_kind(op.default) for op in (aten.bmm, aten.baddbmm, aten._grouped_mm)} == {"batched product"}
    assert _kind(aten.mul.Tensor) == _kind(aten.mm.out) == "other"
