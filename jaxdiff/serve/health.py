"""Whether the server lives, whether it takes requests, and its metrics."""

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from jaxdiff.serve.answering import CarefulRoute, service_of
from jaxdiff.serve.errors import ErrorBody, JSONResponse, documented
from jaxdiff.serve.metrics import CONTENT_TYPE

router = APIRouter(route_class=CarefulRoute, tags=["health"])


class Health(BaseModel):
    """How the server is."""

    status: Literal["ok", "loading", "draining", "broken"]


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Health},
    503: {"model": Health, "description": "Service Unavailable"},
    400: {"model": ErrorBody, "description": "Bad Request"},
}
_PAGE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}


def _health(request: Request) -> Health:
    service = service_of(request)
    if service.is_broken:
        return Health(status="broken")
    if service.draining:
        return Health(status="draining")
    return Health(status="ok" if service.is_ready else "loading")


@router.get("/health/live", responses=_RESPONSES)
async def live(request: Request) -> Response:
    """200 unless only a restart helps."""
    health = _health(request)
    return JSONResponse(health.model_dump(), 503 if health.status == "broken" else 200)


@router.get("/health/ready", responses=_RESPONSES)
async def ready(request: Request) -> Response:
    """200 once the model is loaded and has generated an image, until the server shuts down."""
    health = _health(request)
    return JSONResponse(health.model_dump(), 200 if health.status == "ok" else 503)


@router.get("/metrics", response_class=Response, responses={**_PAGE, **documented()})
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' format."""
    service = service_of(request)
    page = service.metrics.page(service.engine, service.slots)
    return Response(page, headers={"content-type": CONTENT_TYPE})
