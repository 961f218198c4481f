"""Errors that a client sees: one sentence each, in the shape of the API that was asked."""

import json
import logging
import math
import secrets
from collections.abc import Sequence
from http import HTTPStatus
from http.client import responses
from typing import Any

from fastapi import HTTPException
from pydantic import BaseModel
from starlette.responses import Response

from jaxdiff.core.errors import InputError

LOG = logging.getLogger("jaxdiff.serve")
WEB_UI_PREFIX = "/sdapi/"  # of paths that answer as A1111's web UI does
GONE = 499  # nobody is there to read it: the client has closed the connection
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}


class RequestError(HTTPException):
    """What is wrong with a request, and the status of the answer.

    `param` names the field; `code` is for programs; `retry_after` is in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.message, self.param, self.code = message, param, code
        headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)


class ErrorObject(BaseModel):
    """An error as OpenAI's API gives it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error, but those to A1111's API."""

    error: ErrorObject


class WebUIErrorBody(BaseModel):
    """The body of an error of A1111's API."""

    error: str
    detail: str
    body: str
    errors: str


class JSONResponse(Response):
    """JSON in ASCII, so that no text of a client can break the answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_body(error: RequestError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = _TYPES.get(error.status_code, "invalid_request_error")
    own = ErrorObject(message=error.message, type=kind, param=error.param, code=error.code)
    return ErrorBody(error=own).model_dump()


def error_response(error: RequestError, path: str) -> JSONResponse:
    """The answer to a request for `path` that failed with `error`."""
    if path.startswith(WEB_UI_PREFIX):
        phrase = responses.get(error.status_code, "Error")
        own = WebUIErrorBody(error=phrase, detail=error.message, body="", errors="")
        body = own.model_dump()
    else:
        body = error_body(error)
    return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))


def from_input_error(error: InputError, path: str = "") -> RequestError:
    """The error for what a client has asked: 422 of A1111's API, 400 of the others."""
    name = str(error).partition(":")[0]
    param = name if name.isidentifier() else None
    return RequestError(422 if path.startswith(WEB_UI_PREFIX) else 400, str(error), param=param)


def error_of(error: BaseException, path: str = "") -> RequestError:
    """What a client sees of any error; of one that nobody expected, a number that the log has."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InputError):
        return from_input_error(error, path)
    number = secrets.token_hex(8)
    LOG.error("request failed: %s", number, exc_info=error)
    message = f"internal error {number}, which the log of the server explains"
    return RequestError(500, message, code="internal_error")


def from_validation(errors: Sequence[Any], path: str) -> RequestError:
    """The first of pydantic's errors as one sentence."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    name = ".".join(where) or "body"
    if first["type"] == "extra_forbidden":
        message = f"{name}: got an unknown field, expected none of this name"
    elif first["type"] == "missing":
        message = f"{name}: got none, expected a value"
    else:
        message = f"{name}: got {_shown(first.get('input'))}: {first['msg']}"
    status = 422 if path.startswith(WEB_UI_PREFIX) else 400
    return RequestError(status, message, param=where[0] if where else None, code="invalid_value")


def documented(*statuses: int, web_ui: bool = False) -> dict[int | str, dict[str, Any]]:
    """Those statuses for the OpenAPI schema, and those that any request can get."""
    always = (400, 401, 403, 408, 413, 429, 500, 503)
    model = WebUIErrorBody if web_ui else ErrorBody
    everything = sorted({*always, *statuses, *((422,) if web_ui else ())})
    return {
        status: {"model": model, "description": HTTPStatus(status).phrase} for status in everything
    }


def _shown(value: Any) -> str:
    return ascii(value)[:60]
