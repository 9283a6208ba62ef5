"""What a zygote is asked for, and how it is asked."""

import os
import pickle
import re
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Ours, and what starts ours. Memory is measured in processes that have imported what they need and no more.
_MODULES = re.compile(
    r"(?!benchmarks\.memory)(launcher|trainer|sharding|benchmarks|tests)(\.|$)"
    r"|torch\.distributed\.run$|accelerate\.commands\.launch$|deepspeed\.launcher\.(launch|runner)$"
)
_FORK_SERVER = "from multiprocessing.forkserver import main;"
# Read while libraries or the interpreter start. How torch looks for GPUs is not; DeepSpeed sets that at its import.
_READ_AT_IMPORT = re.compile(
    r"(HF_|HUGGINGFACE|TRANSFORMERS_|XDG_|HOME$|LD_|GLIBC|MKL_|KMP_|OPENBLAS|CUDA_|DS_ACC|LANG|LC_|PYTORCH_(?!NVML_)"
    r"|TORCH_(LOGS|CPP|SHOW|DISTRIBUTED)|PYTHON(?!PATH$|SAFEPATH$|FAULTHANDLER$|UNBUFFERED$))"
)
LENGTH = struct.Struct("=q")


@dataclass(frozen=True)
class Program:
    """What an interpreter is told to run.

    Attributes:
        arguments: argv.
        module: of ``-m``; empty where code is given.
        code: of ``-c``.
        rest: what follows.
        flags: before that.
    """

    arguments: list[str]
    module: str
    code: str
    rest: list[str]
    flags: frozenset[str]


@dataclass(frozen=True)
class Request:
    """A process to make.

    Attributes:
        program: what it runs.
        environment: its whole environment.
        folder: its working folder.
        descriptors: numbers under which it has the descriptors that come with this.
        ignored: signals that it ignores.
        blocked: signals that it holds back.
        session: whether it has a session of its own.
        group: its process group otherwise.
    """

    program: Program
    environment: dict[bytes, bytes]
    folder: str
    descriptors: list[int]
    ignored: list[int]
    blocked: list[int]
    session: bool
    group: int


def read_program(arguments: Sequence[str | bytes]) -> Program | None:
    """What argv runs, if a clone can run it in place of a new process."""
    argv = [os.fsdecode(argument) for argument in arguments]
    if not argv or argv[0] != sys.executable:
        return None
    at = 1
    while at < len(argv) and argv[at] in ("-u", "-P", "-B"):
        at += 1
    flags, option, name = frozenset(argv[1:at]), *[*argv[at : at + 2], "", ""][:2]
    if option == "-m" and _MODULES.match(name):
        return Program(argv, name, "", argv[at + 2 :], flags)
    if option == "-c" and name.startswith(_FORK_SERVER):
        return Program(argv, "", name, argv[at + 2 :], flags)
    return None


def is_like_zygotes(environment: Mapping[bytes, bytes], of_zygote: Mapping[bytes, bytes]) -> bool:
    """Whether libraries, had they been imported in this environment, would be as they are in the zygote."""
    if _first_folder(environment) != _first_folder(of_zygote):
        return False
    for name in environment.keys() | of_zygote.keys():
        mine, other = environment.get(name), of_zygote.get(name)
        if mine == other or not _READ_AT_IMPORT.match(os.fsdecode(name)):
            continue
        # A zygote sees none either.
        no_device = name == b"CUDA_VISIBLE_DEVICES" and (not mine or mine.startswith(b"-1"))
        if not no_device and not (name == b"DS_ACCELERATOR" and mine in (b"cpu", None)):
            return False
    return True


def _first_folder(environment: Mapping[bytes, bytes]) -> bytes:
    """Where our own packages are found."""
    return environment.get(b"PYTHONPATH", os.fsencode(ROOT)).split(b":")[0]


def send(connection: socket.socket, request: Request, descriptors: Sequence[int]) -> int:
    message = pickle.dumps(request)
    socket.send_fds(connection, [LENGTH.pack(len(message))], descriptors)
    connection.sendall(message)
    (pid,) = LENGTH.unpack(receive(connection, LENGTH.size))
    return int(pid)


def receive(connection: socket.socket, size: int) -> bytes:
    message = b""
    while len(message) < size:
        part = connection.recv(size - len(message))
        if not part:
            raise EOFError
        message += part
    return message
