"""AdamW in 8 bits against torchao's own step, and against fp32."""

import torch
from torch import nn

from sharding.part import whole_part
from trainer.optimizers.adamw_8bit import AdamW8bit, compiled_update, quantization_block

SHAPE = (20, 512)
BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-8, 1e-2, 0.1


def _optimizer(parameter: nn.Parameter) -> AdamW8bit:
    whole = whole_part("p", parameter)
    return AdamW8bit([{"params": [parameter], "weight_decay": DECAY}], [whole], None, LR, BETAS, EPS)


def _gradient(step: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))


def test_it_is_torchaos_where_its_blocks_are_ours() -> None:
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    ours = nn.Parameter(_gradient(0))
    optimizer = _optimizer(ours)
    theirs, step = ours.detach().clone(), torch.zeros(())
    mean, square = OptimState8bit.zeros(SHAPE, signed=True), OptimState8bit.zeros(SHAPE, signed=False)
    for index in range(1, 6):
        # A multiple that is exact, and what it is to be divided by.
        ours.grad = _gradient(index) * 2.0**index
        optimizer.grad_scale = torch.tensor(2.0**index)
        optimizer.step()
        step += 1
        single_param_adam(
            theirs, _gradient(index), step, mean, square, None, torch.tensor(LR), *BETAS, DECAY, EPS, True, False
        )
    state = optimizer.state[ours]
    assert torch.equal(ours.detach(), theirs)
    assert torch.equal(state["exp_avg_codes"], mean.codes)
    assert torch.equal(state["exp_avg_sq_scales"].view(-1), square.scale)
    assert state["step"] == 5


def test_it_stays_near_fp32_in_a_quarter_of_the_memory() -> None:
    eight_bit, full = nn.Parameter(_gradient(0)), nn.Parameter(_gradient(0))
    optimizers = _optimizer(eight_bit), torch.optim.AdamW([full], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for index in range(1, 21):
        for parameter, optimizer in zip((eight_bit, full), optimizers, strict=True):
            parameter.grad = _gradient(index)
            optimizer.step()
    moved = (full - _gradient(0)).norm()
    assert 0 < (eight_bit - full).norm() < 0.1 * moved
    num_bytes = sum(tensor.nbytes for tensor in optimizers[0].state[eight_bit].values())
    assert num_bytes < 0.26 * sum(tensor.nbytes for tensor in optimizers[1].state[full].values())


def test_a_compiled_step_takes_any_number_of_shapes() -> None:
    # What the compiler limits is their number, 8 by default, and not what becomes of the graphs.
    parameters = [nn.Parameter(torch.ones(64 + index, 64)) for index in range(2)]
    whole = [whole_part(str(p.shape), p) for p in parameters]
    optimizer = AdamW8bit([{"params": parameters, "weight_decay": DECAY}], whole, None, LR, BETAS, EPS)
    optimizer._update_one = compiled_update(backend="eager")
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.grad_scale = torch.tensor(2.0)
    with torch._dynamo.config.patch(recompile_limit=1):
        optimizer.step()
    for parameter in parameters:
        assert torch.equal(parameter, parameters[0][:1].expand_as(parameter))
        assert bool((parameter < 1.0).all())


def test_what_a_block_is() -> None:
    assert quantization_block((20, 512)) == 256
    assert quantization_block((4096, 11008)) == 256
    assert quantization_block((64, 96)) == 96
    assert quantization_block((64, 2 * 150)) == 150
    assert quantization_block((8, 6, 128)) == 256
    # Too small, a vector, rows without a divisor.
    assert quantization_block((15, 256)) is None
    assert quantization_block((8192,)) is None
    assert quantization_block((100, 53)) is None
    assert quantization_block((100, 2 * 257)) is None
