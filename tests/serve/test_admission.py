"""The queue, clients that go, health, and how a server ends."""

import concurrent.futures
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
import tiny
from serving import WAIT, running, wait_for

from jaxdiff.core.errors import InputError
from jaxdiff.pipeline.slots import Slots
from jaxdiff.serve.server import ServerOptions, serve
from jaxdiff.serve.service import Service

FIELDS = {"prompt": "a star", "size": "16x16"}
PATH = "/v1/images/generations"


def begun(server, gate, count=1):
    """A request whose images are in slots, and its future answer."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    client = server.client()
    answer = pool.submit(client.post, PATH, json={**FIELDS, "n": count})
    assert gate.entered.wait(WAIT)
    wait_for(lambda: server.service.engine.slots_in_use == min(count, 2))
    answer.add_done_callback(lambda _: client.close())
    pool.shutdown(wait=False)
    return answer


def test_a_full_queue_gets_429_and_when_to_come_again(pipe, gate):
    gate.set()
    with running(lambda: pipe, max_waiting=10) as server, server.client() as client:
        assert client.post(PATH, json=FIELDS).status_code == 200
        gate.clear()
        gate.entered.clear()
        first = begun(server, gate, count=2)
        jobs = [client.post("/jobs", json={"prompt": "a star", "num_images": 5}) for _ in range(2)]
        assert {job.status_code for job in jobs} == {202}
        for path, fields in (
            (PATH, FIELDS),
            (PATH, {**FIELDS, "stream": True}),
            ("/sdapi/v1/txt2img", {"prompt": "a star"}),
            ("/jobs", {"prompt": "a star"}),
        ):
            answer = client.post(path, json=fields)
            assert answer.status_code == 429, path
            assert 1 <= int(answer.headers["retry-after"]) <= 600
            assert "the queue is full: 10 images are waiting" in answer.text
        assert client.get("/health/ready").status_code == 200  # full is not broken
        # what is cancelled makes room at once
        assert client.post(f"/jobs/{jobs[1].json()['id']}/cancel").status_code == 200
        assert client.post("/jobs", json={"prompt": "a star"}).status_code == 202
        # all of a request, or nothing
        assert client.post("/jobs", json={"prompt": "a star", "num_images": 5}).status_code == 429
        gate.set()
        assert first.result(WAIT).status_code == 200
        page = client.get("/metrics").text
        assert "jaxdiff_requests_rejected_total 5.0" in page


def test_times_to_come_again_are_measured(pipe):
    with running(lambda: pipe) as server, server.client() as client:
        client.post(PATH, json={**FIELDS, "n": 4})
        seconds = server.service._seconds_per_image
        assert 0 < seconds < WAIT
        assert server.service.retry_after() == 1.0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_who_goes_frees_the_slot_or_the_place(server, gate, stream, waits):
    engine = server.service.engine
    before = finished(server, "disconnected")
    other = begun(server, gate, count=2) if waits else None
    body = json.dumps({**FIELDS, "n": 2, "stream": stream, "num_inference_steps": 40}).encode()
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=WAIT) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: engine.waiting + engine.slots_in_use == (4 if waits else 2))
    wait_for(lambda: finished(server, "disconnected") == before + 2)
    gate.set()
    if other is not None:
        assert other.result(WAIT).status_code == 200
    wait_for(lambda: engine.running == engine.waiting == server.server.gate.active == 0)
    with server.client() as client:
        assert client.post(PATH, json=FIELDS).status_code == 200


def finished(server, reason):
    """How many images ended so."""
    page = server.service.metrics.page(server.service.engine, 2).decode()
    found = re.search(rf'jaxdiff_requests_finished_total{{reason="{reason}"}} (\S+)', page)
    return float(found[1])


def test_the_server_answers_while_the_model_works(server, client, gate):
    answer = begun(server, gate)
    for path in ("/health/live", "/metrics", "/v1/models", "/sdapi/v1/progress"):
        assert client.get(path, timeout=10).status_code == 200
    gate.set()
    assert answer.result(WAIT).status_code == 200


def test_ready_once_an_image_is_there(pipe, gate):
    go = threading.Event()

    def load():
        assert go.wait(WAIT)
        return pipe

    with running(load, ready=False) as server, server.client() as client:
        for event, stage in ((go, gate.entered), (gate, None)):
            ready = client.get("/health/ready")
            assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
            assert client.get("/health/live").status_code == 200
            assert client.get("/metrics").status_code == 200
            for path, fields in ((PATH, FIELDS), ("/jobs", FIELDS), ("/sdapi/v1/txt2img", {})):
                answer = client.post(path, json={"prompt": "a star"} if fields else {})
                assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
            event.set()
            if stage is not None:
                assert stage.wait(WAIT)
        wait_for(lambda: client.get("/health/ready").status_code == 200)


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def load():
        raise InputError("model: got no such folder")

    with pytest.raises(InputError, match="no such folder"):
        serve(Service(load), ServerOptions(port=0))


def test_a_port_in_use(pipe):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port: got 127.0.0.1:{port}"):
            serve(Service(lambda: pipe), ServerOptions(port=port))


def test_an_engine_that_breaks_is_not_alive(pipe, monkeypatch):
    def fail(*_):
        raise MemoryError("secret")

    with running(lambda: pipe) as server, server.client() as client:
        monkeypatch.setattr(Slots, "take_finished", fail)
        answer = client.post(PATH, json=FIELDS)
        assert answer.status_code == 500
        assert re.fullmatch(
            r"internal error [0-9a-f]{16}, which the log of the server explains",
            answer.json()["error"]["message"],
        )
        assert client.post(PATH, json=FIELDS).status_code == 503
        for path in ("/health/live", "/health/ready"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["status"]) == (503, "broken")


def test_draining_ends_what_is_begun(pipe, gate):
    gate.set()
    with running(lambda: pipe) as server, server.client() as client:
        gate.clear()
        gate.entered.clear()
        answer = begun(server, gate)
        server.server.handle_exit(signal.SIGTERM, None)
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert client.get("/health/live").status_code == 200
        refused = client.post(PATH, json=FIELDS)
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        gate.set()
        assert answer.result(WAIT).status_code == 200
        server.thread.join(WAIT)
        assert not server.thread.is_alive()


def test_draining_takes_a_bounded_time(pipe, gate):
    gate.set()
    with running(lambda: pipe, shutdown_timeout=0.1) as server:
        gate.clear()
        gate.entered.clear()
        answer = begun(server, gate)
        server.server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: server.service.engine._stopped)
        gate.set()
        refused = answer.result(WAIT)
        assert (refused.status_code, "shutting down" in refused.text) == (503, True)
        server.thread.join(WAIT)
        assert not server.thread.is_alive()


@pytest.mark.slow
def test_a_process_that_gets_sigterm_while_it_compiles(tmp_path):
    """Until it is ready nothing is in progress, and it ends at once, with 0."""
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}  # of the embedded model, which takes seconds
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxdiff", "serve", "--port", str(port)],
        cwd=pathlib.Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}/health/ready"

    def is_loading():
        try:
            return httpx.get(url).json() == {"status": "loading"}
        except httpx.TransportError:
            return False

    wait_for(is_loading)
    compiled = tmp_path / "jaxdiff"
    wait_for(lambda: any(each.is_file() for each in compiled.rglob("*")))
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=WAIT)
    assert (process.returncode, out, errors) == (0, "", "")


@pytest.mark.slow
def test_a_process_that_gets_sigterm(tmp_path):
    model = tiny.write_tiny(tmp_path / "tiny")
    command = [sys.executable, "-W", "error", "-m", "jaxdiff", "serve", "--model", str(model)]
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
        [*command, "--port", "0", "--slots", "2"],
        cwd=root,
        env={**os.environ, "JAXDIFF_API_KEY": "secret"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    url = re.fullmatch(r"serve: tiny is ready at (http://127\.0\.0\.1:\d+) \(.*\)\n", line)[1]
    with httpx.Client(base_url=url, timeout=WAIT) as client:
        assert client.post(PATH, json=FIELDS).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        fields = {**FIELDS, "num_inference_steps": 150, "n": 10}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.post, PATH, json=fields, headers=headers)
            busy = re.compile(r"^jaxdiff_slots_in_use [1-9]", flags=re.M)
            wait_for(lambda: busy.search(httpx.get(f"{url}/metrics", headers=headers).text))
            process.send_signal(signal.SIGTERM)
            assert len(answer.result(WAIT).json()["data"]) == 10
    out, errors = process.communicate(timeout=WAIT)
    assert (process.returncode, out, errors) == (0, "", "")
