"""The application: all APIs behind one gate."""

from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import jaxdiff
from jaxdiff.core.errors import InputError
from jaxdiff.serve import health, jobs_api, openai_api, web_ui_api
from jaxdiff.serve.access import Access, App, Gate
from jaxdiff.serve.errors import (
    RequestError,
    error_of,
    error_response,
    from_input_error,
    from_validation,
)
from jaxdiff.serve.service import Service

ROUTERS = (openai_api.router, web_ui_api.router, jobs_api.router, health.router)


def make_app(service: Service, access: Access) -> tuple[App, Gate]:
    """The ASGI application, and the gate in it, which knows how many requests are being answered.

    Its OpenAPI schema is at /openapi.json.
    """
    app = FastAPI(
        title="jaxdiff",
        version=jaxdiff.__version__,
        summary="Images by OpenAI's API, by A1111's, and as jobs.",
        docs_url=None,  # pages that load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    for kind in (HTTPException, RequestValidationError, InputError, Exception):
        app.add_exception_handler(kind, _answer_error)
    routes = [route for router in ROUTERS for route in router.routes]
    gate = Gate(cast(App, app), service, access, routes)
    if not access.origins:
        return gate, gate
    cors = CORSMiddleware(
        cast(Any, gate),
        allow_origins=list(access.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Priority"],
        expose_headers=["Retry-After"],
    )
    return cast(App, cors), gate


async def _answer_error(request: Request, error: Exception) -> Response:
    path = request.url.path
    if isinstance(error, RequestValidationError):
        own = from_validation(error.errors(), path)
    elif isinstance(error, InputError):
        own = from_input_error(error, path)
    elif isinstance(error, HTTPException) and not isinstance(error, RequestError):
        own = RequestError(error.status_code, f"{path!a:.100}: {error.detail}")
    else:
        own = error_of(error, path)
    return error_response(own, path)
