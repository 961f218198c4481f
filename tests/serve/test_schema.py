"""The OpenAPI schema: what is sent by it finds no error of the server, and no status beside it."""

import contextlib
import os

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import WAIT

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "25"))  # of each operation


# threads of the server draw random numbers while hypothesis looks
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_what_the_schema_allows_and_what_it_does_not(server, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        count += 1

        @seed(1)
        @settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            case.call_and_validate(checks=CHECKS, timeout=WAIT)

        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong where nothing is sent
            check()
    assert count > 20


def test_every_endpoint_is_described(client):
    paths = client.get("/openapi.json").json()["paths"]
    found = {(method, path) for path, methods in paths.items() for method in methods}
    expected = {
        *(("post", f"/v1/images/{name}") for name in ("generations", "edits")),
        *(("get", path) for path in ("/v1/models", "/v1/models/{name}", "/jobs/{number}")),
        *(("get", path) for path in ("/health/live", "/health/ready", "/metrics")),
        *(("get", "/jobs/{number}/result"), ("post", "/jobs"), ("post", "/jobs/{number}/cancel")),
        *(("post", f"/sdapi/v1/{name}") for name in ("txt2img", "img2img", "interrupt")),
        *(("post", f"/sdapi/v1/{name}") for name in ("options", "png-info")),
        *(("get", f"/sdapi/v1/{name}") for name in ("progress", "options", "samplers")),
        *(("get", f"/sdapi/v1/{name}") for name in ("schedulers", "upscalers", "sd-models")),
        *(("get", f"/sdapi/v1/{name}") for name in ("loras", "embeddings")),
    }
    assert found == expected
    for path, methods in paths.items():
        for operation in methods.values():
            assert operation["summary"], path
            assert "200" in operation["responses"] or "202" in operation["responses"]
