"""``shardline serve``: a run's model, or an exported one, answers over HTTP."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import Average, OwnFactories, OwnTask, RemoteCode, Step, expanded
from trainer.commands.entry import entry


def serve(
    path: Annotated[
        Path, typer.Argument(help="Folder of a run or of an exported model.", metavar="RUN|FOLDER", callback=expanded)
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Rows that are computed together, and the most of one request.")
    ] = 32,
    max_wait_ms: Annotated[
        float, typer.Option(min=0.0, max=10_000.0, help="How long a batch waits for more rows.")
    ] = 2.0,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Rows that may wait, and requests at a time; beyond it the answer is 503.")
    ] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of the largest body that is read.")] = 8 * 2**20,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=86_400.0,
            help="How long headers, a body, and then an answer may take, each; 10, and 300 for a language model.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that compute one batch.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most that a language model writes for a request.")] = 512,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="VARIABLE", help="Ask for the key that this environment variable holds."),
    ] = None,
    step: Step = None,
    ema: Average = False,
    task: OwnTask = None,
    factory: OwnFactories = None,
    trust_remote_code: RemoteCode = False,
) -> int:
    """Serve a model: rows by ONNX Runtime with a page to try it, language models as OpenAI's API has them."""
    from sharding.ranks.errors import UserError
    from trainer.serving.options import ServeOptions, api_key_of
    from trainer.serving.start import serve_path

    if max_queue < max_batch:
        raise UserError(f"--max-queue {max_queue} is less than --max-batch {max_batch}, which could then never fill.")
    options = ServeOptions(
        host=host,
        port=port,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        max_body_bytes=max_body,
        num_threads=threads,
        api_key=api_key_of(api_key_env),
    )
    given = [] if step is None else ["--step", str(step)]
    given += ["--ema"] if ema else []
    given += [] if task is None else ["--task", task]
    given += [word for name in factory or () for word in ("--factory", name)]
    given += ["--trust-remote-code"] if trust_remote_code else []
    return serve_path(path, options, given, timeout_s=timeout_s, max_tokens=max_tokens)


main = entry(serve)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
