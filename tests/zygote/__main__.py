"""Becomes a zygote: for a test process, or with a module that has it from the beginning."""

import gc
import os
import pickle
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module

from tests.zygote.client import install
from tests.zygote.clone import serve, start_own_zygote
from tests.zygote.interpreter import run, set_identity
from tests.zygote.request import LENGTH, read_program, receive
from tests.zygote.start import ROOM_VARIABLE

_PRELOADED = (
    "launcher.cli",
    "trainer.rank",
    "trainer.report.page",
    "plotly.offline",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "deepspeed.launcher.launch",
    "accelerate.commands.launch",
    "peft",
    "torch.distributed.run",
    "torch.distributed.elastic.rendezvous.static_tcp_rendezvous",
    "sharding.ranks.forked_ranks",
)
# Of a test process alone, which starts many and of all kinds.
_PRELOADED_FOR_MANY = (
    # What its engines import, inductor among it.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "launcher.commands",
    "launcher.run",
    "trainer.plan.preview",
    "transformers.models.bert.modeling_bert",
    "wandb",
    "wandb.sdk.launch.inputs.internal",
)
# No thread must be there when it clones itself.
_WHILE_IMPORTING = {"OPENBLAS_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _preload(modules: Iterable[str]) -> None:
    for module in modules:
        with suppress(ImportError):
            import_module(module)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"imports have started {len(threads) - 1} threads, whose locks a clone would inherit"
    gc.freeze()


def _main() -> None:
    """``DESCRIPTOR ROOM`` serves a test process; ``ROOM -m MODULE ...`` is a module with a zygote."""
    for name, value in _WHILE_IMPORTING.items():
        os.environ.setdefault(name, value)
    serves_one = sys.argv[2] == "-m"
    _preload(_PRELOADED if serves_one else (*_PRELOADED, *_PRELOADED_FOR_MANY))
    if serves_one:
        left_out = {*_WHILE_IMPORTING, ROOM_VARIABLE}
        of_zygote = {name: value for name, value in os.environb.items() if os.fsdecode(name) not in left_out}
        program = read_program([sys.executable, *sys.argv[2:]])
        assert program is not None
        install(start_own_zygote(of_zygote), of_zygote)
        set_identity(program, of_zygote)
        run(program)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.sendall(LENGTH.pack(0))
    serve(connection, pickle.loads(receive(connection, LENGTH.unpack(receive(connection, LENGTH.size))[0])))


if __name__ == "__main__":
    _main()
