"""The application of a model for rows: predictions over HTTP, described by OpenAPI."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import TypeAdapter, ValidationError

from trainer.data.rows_manifest import RowRecipe
from trainer.serving.batching import Batcher
from trainer.serving.guard import Guard
from trainer.serving.metrics import CONTENT_TYPE, ServerMetrics
from trainer.serving.options import RequestFault, ServeOptions
from trainer.serving.pages import PAGES, add_pages
from trainer.serving.replies import HEALTH, METRICS, MODEL, READY, as_json, in_words, on_fault, refusals, request_body
from trainer.serving.row_forms import request_form, response_form
from trainer.serving.served_model import Asked, ServedModel

PREDICT = "/predict"
_FILE = {"type": "string", "format": "binary"}


def build_row_app(model: ServedModel, options: ServeOptions) -> Guard:
    """An ASGI application that answers for a model.

    Args:
        model: what answers.
        options: the bounds.
    """
    metrics = ServerMetrics()
    batcher = Batcher(
        model.answers,
        max_batch=options.max_batch,
        max_wait_s=options.max_wait_ms / 1000,
        max_queue=options.max_queue,
        on_batch=metrics.batch_rows.observe,
    )
    is_masked = model.mask is not None
    form = request_form(model.row_form, options.max_batch, has_candidates=is_masked)
    adapter: TypeAdapter[Any] = TypeAdapter(form)
    media_types = _media_types(model)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.end()

    run = model.deployment.run
    app = FastAPI(
        title=run.name,
        description=f"Predictions of the run {run.name}, step {run.step}, task {model.deployment.task}.",
        version=run.version or "0",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_exception_handler(RequestFault, on_fault)

    @app.post(
        PREDICT,
        responses={200: {"model": response_form(model.deployment.output_kind)}, **refusals()},
        openapi_extra=request_body(form, **dict.fromkeys(media_types, _FILE)),
        summary="Predict rows.",
    )
    async def predict(request: Request) -> Response:
        """A prediction for each row, in their order; rows of several requests are computed together."""
        body = await request.body()
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type in media_types:
            body = media_types[media_type](body)
        elif media_type != "application/json":
            allowed = ", ".join(["application/json", *media_types])
            raise RequestFault(415, f"content-type {media_type or 'is not given'}; this model reads {allowed}")
        try:
            asked = adapter.validate_json(body)
        except ValidationError as error:
            raise RequestFault(422, in_words(error)) from None
        answer = await batcher.ask(Asked(asked.rows, getattr(asked, "top_k", 1)), len(asked.rows), options.timeout_s)
        return as_json({"predictions": answer})

    @app.get(MODEL, summary="What the model is, and what its rows have.")
    async def describe() -> Response:
        return as_json(description(model, options))

    @app.get(HEALTH, summary="Whether the process lives.")
    async def health() -> Response:
        return as_json({"status": "alive"})

    @app.get(READY, summary="Whether it takes requests.", responses={503: {"description": "No more: the server ends."}})
    async def ready() -> Response:
        return as_json({"status": "ending"}, 503) if guard.is_ending else as_json({"status": "ready"})

    @app.get(METRICS, summary="Counters, for Prometheus.")
    async def show_metrics() -> Response:
        metrics.queue_rows.set(batcher.num_rows)
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    add_pages(app)
    guard = Guard(
        app,
        options,
        metrics,
        open_paths={*PAGES, HEALTH, READY},
        known_paths={*PAGES, PREDICT, MODEL, HEALTH, READY, METRICS},
    )
    return guard


def description(model: ServedModel, options: ServeOptions) -> dict[str, Any]:
    """What a client may want to know of a model before it asks."""
    deployment, recipe = model.deployment, model.recipe
    said: dict[str, Any] = {
        "name": deployment.run.name,
        "step": deployment.run.step,
        "task": deployment.task,
        "kind": model.kind,
        "answer": deployment.output_kind,
        "classes": deployment.classes,
        "max_rows": options.max_batch,
        "max_body_bytes": options.max_body_bytes,
    }
    if recipe is not None:
        said |= _of_rows(recipe)
    return said | ({"mask": model.mask} if model.mask is not None else {})


def _of_rows(recipe: RowRecipe) -> dict[str, Any]:
    if recipe.kind == "table":
        return {
            "features": recipe.features,
            "categories": {column.name: column.values[:1000] for column in recipe.categories},
            "fills_missing": recipe.missing == "mean",
        }
    if recipe.kind == "image":
        return {"image_shape": recipe.image_shape, "max_pixel": recipe.max_pixel}
    if recipe.kind == "audio":
        return {"sampling_rate": recipe.sampling_rate, "num_audio_samples": recipe.num_audio_samples}
    return {"max_tokens": recipe.sequence_length}


def _media_types(model: ServedModel) -> dict[str, Any]:
    """Types of a body that is one row as it lies in a file, and what makes JSON of it."""

    def as_text(body: bytes) -> bytes:
        try:
            return json.dumps({"rows": [{"text": body.decode()}]}).encode()
        except UnicodeDecodeError:
            raise RequestFault(422, "the text is not UTF-8") from None

    def as_file(name: str) -> Any:
        return lambda body: json.dumps({"rows": [{name: base64.b64encode(body).decode()}]}).encode()

    fields = model.row_form.model_fields
    if "text" in fields:
        return {"text/plain": as_text}
    if "image" in fields:
        return dict.fromkeys(("image/png", "image/jpeg", "image/bmp", "image/webp", "image/gif"), as_file("image"))
    is_sound = "audio" in fields
    return dict.fromkeys(("audio/wav", "audio/x-wav", "audio/flac", "audio/ogg"), as_file("audio")) if is_sound else {}
