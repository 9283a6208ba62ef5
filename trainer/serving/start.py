"""From a run or an exported folder to a server of it."""

import logging
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sharding.ranks.errors import UserError
from trainer.config import load_frozen_config
from trainer.deploy.signature import DEPLOYMENT_NAME, read_deployment
from trainer.serving.options import ServeOptions

_HF_CONFIG = "config.json"
_LANGUAGE_MODEL = "causal-lm"
_TIMEOUT_S, _LANGUAGE_TIMEOUT_S = 10.0, 300.0


def serve_path(
    path: Path,
    options: ServeOptions,
    export_arguments: Sequence[str],
    *,
    timeout_s: float | None,
    max_tokens: int,
) -> int:
    """Answer for a run or an exported folder until a signal asks for the end; returns the exit status.

    Args:
        path: of either.
        options: the bounds.
        export_arguments: options of ``shardline export`` for a run: which step of it, and the code that may run.
        timeout_s: of ``options``; None for what fits the model.
        max_tokens: the most that a language model writes for one request.

    Raises:
        UserError: there is neither, it cannot be served, a package is missing, or the port is in use.
    """
    _refuse_missing()
    from trainer.serving.http_server import bind

    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    found = _look_at(path)
    if export_arguments and not found.is_run:
        raise UserError(f"{export_arguments[0]}: {path} is an exported model, which is what it is; name the run.")
    if timeout_s is None:
        timeout_s = _LANGUAGE_TIMEOUT_S if found.is_language else _TIMEOUT_S
    options = replace(options, timeout_s=timeout_s)
    # Until there is a server with an end of its own, what is started here must not outlive a request to end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The port first of all, for what comes next takes its time.
    with bind(options.host, options.port) as listener, tempfile.TemporaryDirectory(prefix="shardline-serve-") as work:
        folder = path
        if found.is_run:
            folder = Path(work) / "model"
            merge = ["--merge"] if found.has_adapters else []
            status = _export(path, folder, "hf" if found.is_language else "onnx", [*merge, *export_arguments])
            if status:
                return status
        if found.is_language:
            from trainer.serving.language_model import serve_language_model

            return serve_language_model(folder, path.resolve().name, listener, options, max_tokens)
        _serve_rows(folder, listener, options)
    return 0


def _serve_rows(folder: Path, listener: socket.socket, options: ServeOptions) -> None:
    from trainer.serving.http_server import serve_app, url_of
    from trainer.serving.row_app import build_row_app
    from trainer.serving.served_model import ServedModel

    model = ServedModel(folder, options.num_threads)
    model.warm_up()
    app = build_row_app(model, options)
    run = model.deployment.run
    print(f"serving {run.name}, step {run.step}, at {url_of(listener)} (POST /predict; Ctrl-C ends)", flush=True)
    serve_app(app, listener, options.timeout_s)


@dataclass(frozen=True)
class _Found:
    """What a path holds."""

    is_language: bool
    is_run: bool = False
    has_adapters: bool = False


def _look_at(path: Path) -> _Found:
    """Look at a path.

    Raises:
        UserError: it holds nothing that can be served.
    """
    if (path / DEPLOYMENT_NAME).exists():
        deployment = read_deployment(path)
        return _Found(deployment.task == _LANGUAGE_MODEL and deployment.format == "hf")
    if (path / "config.yaml").exists():
        config = load_frozen_config(path / "config.yaml")
        return _Found(config.task.name == _LANGUAGE_MODEL, is_run=True, has_adapters=config.model.lora.rank > 0)
    if (path / _HF_CONFIG).exists():
        # Exported by an older release, or somebody else's.
        return _Found(is_language=True)
    raise UserError(f"{path} is neither a run's folder nor an exported model; check the path.")


def _export(run: Path, folder: Path, form: str, arguments: Sequence[str]) -> int:
    """Export a run in a process of its own, so that this one never loads torch; returns the exit status."""
    print(f"exporting {run} ({form})", flush=True)
    command = [sys.executable, "-m", "trainer.commands.export", str(run), "--to", str(folder), "--format", form]
    # What it says on the way is no news to whoever asked for a server.
    return subprocess.run([*command, *arguments], stdout=subprocess.DEVNULL).returncode


def _refuse_missing() -> None:
    try:
        import fastapi  # noqa: F401
        import httptools  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"shardline serve needs {error.name}, which is not installed; install it with pip install "
            "'shardline[serve]'."
        ) from None
