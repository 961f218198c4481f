"""Jobs: asked for now, fetched later, and let go of."""

import base64

import numpy as np
import pytest
from serving import image_of, png, running, wait_for

from jaxdiff.serve.job_store import Jobs

COLOURS = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)


def ended(client, number):
    def is_over():
        state = client.get(f"/jobs/{number}").json()["state"]
        return state in ("done", "failed", "cancelled")

    wait_for(is_over)
    answer = client.get(f"/jobs/{number}/result")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_options_by_their_own_names(pipe, client):
    options = {
        "negative_prompt": "a circle",
        "steps": 3,
        "guidance_scale": 2.0,
        "guidance": "cfg+rescale:phi=0.5",
        "sampler": "euler",
        "timestep_spacing": "trailing",
        "height": 32,
        "width": 16,
        "clip_skip": 1,
    }
    answer = client.post("/jobs", json={"prompt": "a star", "num_images": 2, "seed": 4, **options})
    assert answer.status_code == 202, answer.text
    status = answer.json()
    assert status.keys() == {"id", "state", "progress", "queue_position", "created"}
    result = ended(client, status["id"])
    assert client.get(f"/jobs/{status['id']}").json()["progress"] == 1
    plain = pipe("a star", seed=[4, 5], output="numpy", **options)
    assert [each["seed"] for each in result["images"]] == [4, 5]
    for each, expected in zip(result["images"], plain.images, strict=True):
        found = np.asarray(image_of(each["b64_json"])).astype(int)
        assert np.abs(found - expected).max() <= 1


def test_images_and_masks(pipe, client):
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12] = 255
    texts = {
        name: base64.b64encode(png(array)).decode()
        for name, array in (("image", COLOURS), ("mask", mask))
    }
    options = {"strength": 0.5, "steps": 4, "seed": 1}
    answer = client.post("/jobs", json={"prompt": "a star", **texts, **options})
    result = ended(client, answer.json()["id"])
    plain = pipe("a star", image=COLOURS, mask=mask, output="numpy", **options)
    found = np.asarray(image_of(result["images"][0]["b64_json"])).astype(int)
    assert np.abs(found - plain.images[0]).max() <= 1


def test_waiting_cancelled_and_unknown(client, gate):
    posts = [
        client.post("/jobs", json={"prompt": "a star", "num_images": 2, "priority": 1}).json()
        for _ in range(3)
    ]
    assert gate.entered.wait(60)
    wait_for(lambda: client.get(f"/jobs/{posts[0]['id']}").json()["state"] == "sampling")
    last = client.get(f"/jobs/{posts[2]['id']}").json()
    assert (last["state"], last["queue_position"], last["progress"]) == ("waiting", 2, 0)
    # a lower number goes first
    urgent = client.post("/jobs", json={"prompt": "a star"}, headers={"X-Priority": "-1"}).json()
    assert client.get(f"/jobs/{urgent['id']}").json()["queue_position"] == 0
    answer = client.get(f"/jobs/{posts[2]['id']}/result")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_not_done")
    for post in posts[1:]:
        assert client.post(f"/jobs/{post['id']}/cancel").status_code == 200
    gate.set()
    for post in posts[1:]:
        result = ended(client, post["id"])
        assert result["state"] == "cancelled"
        assert {each["error"] for each in result["images"]} == {"the request was cancelled"}
    assert ended(client, posts[0]["id"])["state"] == "done"
    assert ended(client, urgent["id"])["state"] == "done"
    answer = client.post(f"/jobs/{posts[0]['id']}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (200, "done")
    for method, path in (("GET", "x"), ("GET", "x/result"), ("POST", "x/cancel")):
        assert client.request(method, f"/jobs/{path}").status_code == 404


def test_an_image_that_is_not_finite_is_the_only_one_missing(client, not_finite):
    answer = client.post("/jobs", json={"prompt": "a star", "num_images": 3, "seed": 12})
    result = ended(client, answer.json()["id"])
    assert result["state"] == "done"
    assert [each["b64_json"] is None for each in result["images"]] == [False, True, False]
    assert "not finite" in result["images"][1]["error"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "/etc/passwd"}, "image: got no base64"),
        ({"mask": base64.b64encode(png(COLOURS)).decode()}, "mask: got a mask without an image"),
        ({"sampler": "best"}, "sampler: got 'best'"),
        ({"prompt_2": "x"}, "prompt_2: got 'x', expected none"),
        ({"noise_level": 3}, "noise_level: got 3, expected none"),
        ({"num_images": 11}, "num_images: got 11"),
        ({"loras": ["ink"]}, "loras: got 'ink'"),
        ({"output_compression": 3}, "output_compression: got it with output_format png"),
        ({"classifier_scale": 3}, "classifier_scale: got an unknown field"),
    ],
)
def test_one_sentence_for_what_is_not_served(client, fields, message):
    answer = client.post("/jobs", json={"prompt": "a star", **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_jobs_are_kept_for_a_bounded_time_number_and_size(pipe):
    fields = {"prompt": "a star"}
    with running(lambda: pipe, jobs=Jobs(max_jobs=2)) as server, server.client() as client:
        numbers = []
        for _ in range(3):
            numbers.append(client.post("/jobs", json=fields).json()["id"])
            ended(client, numbers[-1])
        statuses = [client.get(f"/jobs/{number}").status_code for number in numbers]
        assert statuses == [404, 200, 200]
        server.service.jobs._max_bytes = 1
        assert client.get(f"/jobs/{numbers[-1]}").status_code == 404
        server.service.jobs._max_bytes, server.service.jobs._ttl = 2**30, 0.0
        number = client.post("/jobs", json=fields).json()["id"]
        wait_for(lambda: client.get(f"/jobs/{number}").status_code == 404)


def test_too_many_jobs_that_have_not_ended(pipe, gate):
    with running(lambda: pipe, jobs=Jobs(max_jobs=2), ready=False) as server:
        gate.set()
        wait_for(lambda: server.service.is_ready)
        gate.clear()
        with server.client() as client:
            for _ in range(2):
                assert client.post("/jobs", json={"prompt": "a star"}).status_code == 202
            answer = client.post("/jobs", json={"prompt": "a star"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_jobs")
            gate.set()
