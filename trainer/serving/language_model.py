"""A language model as OpenAI's API has it: ``transformers serve`` on loopback, and its bounds before it."""

import asyncio
import json
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED, UserError
from sharding.ranks.sentences import print_error
from trainer.serving.batching import BUSY_RETRY_S
from trainer.serving.guard import Guard
from trainer.serving.http_server import serve_app, url_of
from trainer.serving.language_forms import ChatForm, CompletionForm
from trainer.serving.metrics import CONTENT_TYPE, ServerMetrics
from trainer.serving.options import RequestFault, ServeOptions
from trainer.serving.pages import PAGES, add_pages
from trainer.serving.prompts import Prompts
from trainer.serving.replies import HEALTH, METRICS, MODEL, READY, as_json, in_words, on_fault, refusals, request_body
from trainer.serving.transformers_process import TransformersProcess

CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
_CONNECT_S = 5.0


def serve_language_model(
    folder: Path, name: str, listener: socket.socket, options: ServeOptions, max_tokens: int
) -> int:
    """Answer for a language model until a signal asks for the end; returns the exit status.

    Args:
        folder: the model, as ``from_pretrained`` loads it.
        name: what it is called.
        listener: a bound socket.
        options: the bounds; ``max_batch`` requests are answered at a time.
        max_tokens: the most tokens of an answer.

    Raises:
        UserError: a package is missing, or the folder holds no whole language model.
        RunFailure: it cannot be loaded.
    """
    _refuse_missing()
    prompts = Prompts(folder, max_tokens)
    with tempfile.TemporaryDirectory(prefix="shardline-serve-") as work:
        process = TransformersProcess(folder, Path(work) / "log")
        try:
            process.wait_until_ready()
            app = build_language_app(prompts, name, process, options)
            how = "chat and completions" if prompts.has_template else "completions; there is no chat template"
            print(f"serving {name} at {url_of(listener)}/v1 ({how}; Ctrl-C ends)", flush=True)
            serve_app(app, listener, options.timeout_s)
            if process.process.poll() is not None:
                print_error(
                    f"transformers serve ended with status {process.process.returncode}: {process.last_words()}"
                )
                return EXIT_FAILED
        finally:
            process.end()
    return EXIT_FINISHED


def build_language_app(prompts: Prompts, name: str, process: TransformersProcess, options: ServeOptions) -> Guard:
    """An ASGI application that bounds requests and passes them on.

    Args:
        prompts: what a request may ask for.
        name: what the model is called.
        process: what answers.
        options: the bounds.
    """
    metrics = ServerMetrics()
    turn = asyncio.Semaphore(options.max_batch)
    # No proxy stands between two processes of one machine.
    client = httpx.AsyncClient(
        base_url=process.url, timeout=httpx.Timeout(options.timeout_s, connect=_CONNECT_S), trust_env=False
    )

    async def end_with_process() -> None:
        while process.process.poll() is None:
            await asyncio.sleep(0.5)
        # Without it there is nothing to serve; what waits is told so.
        os.kill(os.getpid(), signal.SIGTERM)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.get_running_loop().create_task(end_with_process())
        yield
        watch.cancel()
        await client.aclose()

    app = FastAPI(
        title=name, description=f"The language model {name}.", docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.add_exception_handler(RequestFault, on_fault)

    async def answer(request: Request, form: type[ChatForm] | type[CompletionForm], path: str) -> Response:
        try:
            asked = form.model_validate_json(await request.body())
        except ValidationError as error:
            raise RequestFault(422, in_words(error)) from None
        body = await asyncio.to_thread(prompts.upstream, asked)
        try:
            await asyncio.wait_for(turn.acquire(), options.timeout_s)
        except TimeoutError:
            raise RequestFault(503, "too many texts are written at a time; ask again", BUSY_RETRY_S) from None
        try:
            passed = await client.send(client.build_request("POST", path, json=body), stream=True)
        except httpx.TimeoutException:
            turn.release()
            raise RequestFault(503, f"there was no answer within {options.timeout_s:g} s", BUSY_RETRY_S) from None
        except httpx.HTTPError:
            turn.release()
            raise RequestFault(503, "the model does not answer; ask again", BUSY_RETRY_S) from None
        return _Relayed(passed, name, prompts.folder, turn)

    @app.post(COMPLETIONS, summary="Continue a text.", responses=refusals(), openapi_extra=request_body(CompletionForm))
    async def complete(request: Request) -> Response:
        return await answer(request, CompletionForm, COMPLETIONS)

    @app.post(CHAT, summary="Answer a conversation.", responses=refusals(), openapi_extra=request_body(ChatForm))
    async def chat(request: Request) -> Response:
        if not prompts.has_template:
            raise RequestFault(422, f"the model has no chat template, for it has learnt texts; use {COMPLETIONS}")
        return await answer(request, ChatForm, CHAT)

    @app.get(MODELS, summary="The one model.")
    async def models() -> Response:
        return as_json(
            {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "shardline"}]}
        )

    @app.get(MODEL, summary="What the model is.")
    async def describe() -> Response:
        limits = {"max_tokens": prompts.max_tokens, "positions": prompts.positions, "has_chat": prompts.has_template}
        return as_json({"name": name, "task": "causal-lm", "kind": "language", "classes": [], **limits})

    @app.get(HEALTH, summary="Whether the process lives.")
    async def health() -> Response:
        return as_json({"status": "alive"})

    @app.get(READY, summary="Whether it takes requests.", responses={503: {"description": "Not any more."}})
    async def ready() -> Response:
        is_ready = process.process.poll() is None and not guard.is_ending
        return as_json({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.get(METRICS, summary="Counters, for Prometheus.")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    add_pages(app)
    known = {*PAGES, CHAT, COMPLETIONS, MODELS, MODEL, HEALTH, READY, METRICS}
    guard = Guard(app, options, metrics, open_paths={*PAGES, HEALTH, READY}, known_paths=known)
    return guard


class _Relayed(StreamingResponse):
    """An answer as it comes, under the model's name in place of the folder that it lies in."""

    def __init__(self, passed: httpx.Response, name: str, folder: Path, turn: asyncio.Semaphore) -> None:
        """Relay an answer; the turn is given back at its end, or when the one who asked has gone."""
        media_type = passed.headers.get("content-type", "application/json")
        super().__init__(self._parts(), passed.status_code, media_type=media_type)
        self._passed = passed
        self._turn = turn
        self._inner, self._outer = json.dumps(f"{folder}@main").encode(), json.dumps(name).encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # A model that is not listened to any more stops writing.
            await self._passed.aclose()
            self._turn.release()

    async def _parts(self) -> AsyncIterator[bytes]:
        if self._passed.headers.get("content-type", "").startswith("text/event-stream"):
            rest = b""
            async for part in self._passed.aiter_bytes():
                # Lines of httpx end also at separators that a text has inside.
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    yield line.replace(self._inner, self._outer) + b"\n"
            if rest:
                yield rest.replace(self._inner, self._outer)
        else:
            yield (await self._passed.aread()).replace(self._inner, self._outer)


def _refuse_missing() -> None:
    try:
        import openai  # noqa: F401
    except ImportError:
        raise UserError(
            "shardline serve of a language model needs openai, which is not installed; install it with pip install "
            "'shardline[serve]'."
        ) from None
