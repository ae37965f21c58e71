"""The OpenAPI document: FastAPI's, with the types of the requests, which this server parses itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REFERENCE = "#/components/schemas/{model}"


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """What a route says of the body that it takes."""
    schema = {"$ref": _REFERENCE.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def names_in(path: str) -> dict[str, Any]:
    """What a route says of the names in its path, such as ``{model}``."""
    names = re.findall(r"{(\w+)}", path)
    place = {"in": "path", "required": True, "schema": {"type": "string"}}
    return {"parameters": [{"name": name, **place} for name in names]} if names else {}


def document(app: FastAPI, kinds: Sequence[type[BaseModel]], keys: bool, description: str) -> dict[str, Any]:
    """The document of an app.

    Args:
        kinds: of the requests.
        keys: whether the server asks for keys.
    """
    found = get_openapi(title=app.title, version=app.version, description=description, routes=app.routes)
    _, made = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REFERENCE)
    components = found.setdefault("components", {})
    components["schemas"] = {**made.get("$defs", {}), **components.get("schemas", {})}
    if keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        found["security"] = [{"bearer": []}, {"header": []}]
    return found
