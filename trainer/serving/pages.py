"""Pages for a browser: one to try the model, one that shows what OpenAPI says; nothing in them comes from elsewhere."""

import json
from html import escape
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Response

TRY, DOCS, OPENAPI = "/", "/docs", "/openapi.json"
_FILES = {"/page.css": "text/css", "/page.js": "text/javascript"}
PAGES = (TRY, DOCS, OPENAPI, *_FILES)
"""Paths that a browser reads without a key."""

_HEADERS = {
    # Nothing of a page may be loaded from, or sent to, anywhere but this server.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_pages(app: FastAPI) -> None:
    """Let an application show its pages."""
    shown = {path: _read(path[1:]) for path in _FILES} | {TRY: _read("page.html")}

    def add(path: str, content: bytes, media_type: str) -> None:
        async def show() -> Response:
            return Response(content, headers=_HEADERS, media_type=media_type)

        app.add_api_route(path, show, methods=["GET"], include_in_schema=False)

    for path, media_type in _FILES.items():
        add(path, shown[path], media_type)
    add(TRY, shown[TRY].replace(b"TITLE", escape(app.title).encode()), "text/html")
    add(DOCS, _docs(app.openapi()).encode(), "text/html")


def _read(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()


def _docs(description: dict[str, Any]) -> str:
    """What OpenAPI says, as a page."""
    about = description["info"]
    parts = [f"<p>{escape(about.get('description', ''))} For programs: <a href='{OPENAPI}'>{OPENAPI}</a>.</p>"]
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<section><h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('summary', ''))} {escape(operation.get('description', ''))}</p>")
            contents = operation.get("requestBody", {}).get("content", {})
            for media_type, content in contents.items():
                parts.append(f"<h3>{escape(media_type)}</h3>{_as_code(content['schema'])}")
            rows = "".join(
                f"<tr><td>{escape(status)}</td><td>{escape(answer.get('description', ''))}</td></tr>"
                for status, answer in operation.get("responses", {}).items()
            )
            parts.append(f"<table><tbody>{rows}</tbody></table></section>")
    schemas = description.get("components", {}).get("schemas", {})
    parts += [f"<section><h2>{escape(name)}</h2>{_as_code(schema)}</section>" for name, schema in schemas.items()]
    title = f"{escape(about['title'])}: what it answers"
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        "<link rel='stylesheet' href='/page.css'>"
        f"</head><body><main><h1>{title}</h1>{''.join(parts)}</main></body></html>"
    )


def _as_code(schema: dict[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(schema, indent=1))}</pre>"
