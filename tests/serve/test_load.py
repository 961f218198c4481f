"""Many clients at once, some of which go: every request ends, and nothing is left behind."""

import collections
import random
import threading

import httpx
import pytest
from serving import WAIT, running, wait_for

PATH = "/v1/images/generations"
CLIENTS, REQUESTS = 12, 8


def ask(url, rng, statuses):
    fields = {
        "prompt": rng.choice(["a star", "a circle"]),
        "n": rng.randint(1, 3),
        "size": rng.choice(["16x16", "16x32", "auto"]),
        "num_inference_steps": rng.randint(1, 40),
        "guidance_scale": rng.choice([1.0, 2.0]),
        "stream": rng.random() < 0.3,
        "priority": rng.randint(-10, 10),
    }
    timeout = rng.choice([0.002, 0.02, WAIT, WAIT])
    kind = rng.choice(["image", "image", "job", "web"])
    try:
        with httpx.Client(base_url=url, timeout=timeout) as client:
            if kind == "image":
                answer = client.post(PATH, json=fields)
            elif kind == "web":
                answer = client.post("/sdapi/v1/txt2img", json={"steps": 5})
            else:
                answer = client.post("/jobs", json={"prompt": "a star", "num_images": 2})
                if answer.status_code == 202 and rng.random() < 0.5:
                    client.post(f"/jobs/{answer.json()['id']}/cancel")
            statuses[answer.status_code] += 1
    except httpx.TimeoutException:
        statuses["gone"] += 1


@pytest.mark.slow
def test_many_clients(pipe):
    statuses = collections.Counter()
    with running(lambda: pipe, max_waiting=12) as server:

        def work(number):
            rng = random.Random(number)
            for _ in range(REQUESTS):
                ask(server.url, rng, statuses)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
            assert not thread.is_alive()
        engine = server.service.engine
        wait_for(lambda: engine.waiting == engine.running == server.server.gate.active == 0)
        assert not engine._live
        assert not server.service.calls
        assert server.service.is_ready
        page = server.service.metrics.page(engine, 2).decode()
        assert 'finished_total{reason="error"} 0.0' in page
    assert set(statuses) <= {200, 202, 429, "gone"}
    assert {200, 202, 429, "gone"} <= set(statuses)
    assert statuses.total() == CLIENTS * REQUESTS
