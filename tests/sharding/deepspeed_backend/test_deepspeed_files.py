"""Parameters and optimizer state that DeepSpeed's ZeRO-3 keeps in files. The first run compiles async_io: minutes."""

import shutil
from pathlib import Path

import pytest
import torch

from sharding.part import Part
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import tiny_engine, train_steps
from tests.support import run_on_ranks

# DeepSpeed writes a partition to a file only where it has at least 1 MiB.
_MODEL = {
    "architecture": "llama",
    "config": {
        "hidden_size": 512,
        "intermediate_size": 1300,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    },
}


def _in_files(ranks: Ranks, folder: str) -> None:
    reference = train_steps(tiny_engine(ranks, "zero3", backend="deepspeed", model=_MODEL), ranks)
    for offload_optimizer in ("cpu", "nvme"):
        settings = {"model": _MODEL, "offload_parameters": "nvme", "offload_optimizer": offload_optimizer}
        engines = [
            tiny_engine(
                ranks, "zero3", backend="deepspeed", nvme_path=f"{folder}/{offload_optimizer}-{index}", **settings
            )
            for index in range(2)
        ]
        assert train_steps(engines[0], ranks) == pytest.approx(reference, rel=1e-6), offload_optimizer
        files = Path(f"{folder}/{offload_optimizer}-0/zero_stage_3")
        # Two layers of three large matrices.
        assert len(list(files.glob(f"float32params/rank{ranks.rank}/*.swp"))) == 6
        moments = {path.name.partition("-")[0] for path in files.glob(f"optimizer/rank{ranks.rank}/exp*.swp")}
        assert moments == ({"exp_avg", "exp_avg_sq"} if offload_optimizer == "nvme" else set())
        saved = {p.name: p.tensor.clone() for p in engines[0].state(with_optimizer=True)}

        def read(part: Part, saved: dict[str, torch.Tensor] = saved) -> None:
            part.tensor.copy_(saved[part.name])

        engines[1].load_state(read, with_optimizer=True)
        continued = [train_steps(engine, ranks, num_steps=2) for engine in engines]
        assert continued[0] == continued[1], offload_optimizer


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_state_in_files_trains_and_continues_the_same(tmp_path: Path) -> None:
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible() or shutil.which("g++") is None:
        pytest.skip("DeepSpeed's async_io needs libaio-dev and g++")
    # Here and not in two ranks at once, which would wait for one another's lock.
    builder.load()
    run_on_ranks(_in_files, 2, str(tmp_path), timeout_s=600)
