"""The start-up yardstick: what a person writes first, started by torchrun: one step of DDP on random tokens.

``torchrun --nproc-per-node N benchmarks/contestants/bare_script.py MODEL_JSON MICRO_SIZE SEQUENCE_LENGTH``
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM


def main(model_json: str, micro_size: int, sequence_length: int) -> None:
    """Train for one step and say so on rank 0."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if has_gpu else "gloo")
    fields = json.loads(model_json)
    model = DistributedDataParallel(AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(fields["vocab_size"], (micro_size, sequence_length), device=device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0:
        print(f"step 1  loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
