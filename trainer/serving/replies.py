"""What answers have in common, and how OpenAPI describes it."""

import json
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel, ValidationError

from trainer.serving.options import RequestFault
from trainer.serving.row_forms import Refusal

MODEL, HEALTH, READY, METRICS = "/model", "/health", "/ready", "/metrics"
_STATUSES = {
    401: "The key is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "The body, or a file in it, is too large.",
    415: "The body is of another type.",
    422: "The body is no JSON, or nothing that this model reads; `detail` says why.",
    503: "Too much waits for an answer already, or it took too long; `Retry-After` says when to ask again.",
}
_MAX_FAULTS = 3


def refusals() -> dict[int | str, dict[str, Any]]:
    """Statuses of answers that are none, for OpenAPI."""
    return {status: {"model": Refusal, "description": text} for status, text in _STATUSES.items()}


def request_body(form: type[BaseModel], **others: dict[str, Any]) -> dict[str, Any]:
    """The body of a request for OpenAPI: JSON of a form, or of another media type by its schema."""
    contents: dict[str, Any] = {"application/json": {"schema": _inlined(form.model_json_schema())}}
    for media_type, schema in others.items():
        contents[media_type] = {"schema": schema}
    return {"requestBody": {"required": True, "content": contents}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its parts in their places, since a path of OpenAPI has no definitions of its own."""
    parts = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(one) for one in value]
        if not isinstance(value, dict):
            return value
        name = value.get("$ref")
        if isinstance(name, str):
            return resolve(parts[name.removeprefix("#/$defs/")])
        return {key: resolve(one) for key, one in value.items()}

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def in_words(error: ValidationError) -> str:
    """What is wrong with a body, in a sentence, which repeats nothing of it: JSON could not carry infinity back."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    said = []
    for fault in faults[:_MAX_FAULTS]:
        place = ".".join(str(part) for part in fault["loc"])
        said.append(f"{place}: {fault['msg']}" if place else fault["msg"])
    more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
    return "; ".join(said) + more


def as_json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A document; one that is not finite is an error of ours."""
    content = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return Response(content, status, headers, media_type="application/json")


async def on_fault(_: Request, fault: Exception) -> Response:
    """The answer to a request that has none."""
    assert isinstance(fault, RequestFault), "it is called for these alone"
    headers = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
    return as_json({"detail": fault.detail}, fault.status, headers)
