"""Metrics: what they count, and that clients cannot make more of them."""

import logging

from prometheus_client.parser import text_string_to_metric_families
from serving import running

PATH = "/v1/images/generations"


def samples(client):
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_what_is_counted(pipe, not_finite):
    with running(lambda: pipe) as server, server.client() as client:
        fields = {"prompt": "a star", "size": "16x32", "num_inference_steps": 3, "seed": 1}
        assert client.post(PATH, json={**fields, "n": 3}).status_code == 200
        assert client.post(PATH, json={**fields, "seed": 13}).status_code == 500
        assert client.post(PATH, json={**fields, "size": "1x1"}).status_code == 400
        assert client.get("/nowhere").status_code == 404
        assert client.get("/jobs/x").status_code == 404
        found = samples(client)
    expected = {
        ("jaxdiff_images_total",): 3,
        ("jaxdiff_image_pixels_total",): 3 * 16 * 32,
        ("jaxdiff_denoising_steps_total",): 9,
        ("jaxdiff_requests_finished_total", "done"): 3,
        ("jaxdiff_requests_finished_total", "not_finite"): 1,
        ("jaxdiff_requests_finished_total", "cancelled"): 0,
        ("jaxdiff_requests_running",): 0,
        ("jaxdiff_requests_waiting",): 0,
        ("jaxdiff_slots",): 2,
        ("jaxdiff_slots_in_use",): 0,
        ("jaxdiff_request_latency_seconds_count",): 3,
        ("jaxdiff_request_queue_seconds_count",): 4,
        **{("jaxdiff_stage_seconds_count", stage): 3 for stage in ("waiting", "sampling")},
        ("jaxdiff_stage_seconds_count", "decoding"): 3,
        ("jaxdiff_http_responses_total", PATH, "200"): 1,
        ("jaxdiff_http_responses_total", PATH, "500"): 1,
        ("jaxdiff_http_responses_total", PATH, "400"): 1,
        ("jaxdiff_http_responses_total", "other", "404"): 1,
        ("jaxdiff_http_responses_total", "/jobs/{number}", "404"): 1,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["jaxdiff_sampling_seconds_total",] > 0
    stages = sum(v for k, v in found.items() if k[0] == "jaxdiff_stage_seconds_sum")
    assert abs(stages - found["jaxdiff_request_latency_seconds_sum",]) < 1e-3


def test_a_log_of_requests(client, caplog):
    with caplog.at_level(logging.INFO, "jaxdiff.serve"):
        client.post(PATH, json={"prompt": "a star", "user": "me\n"})
        client.get("/health/live")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == r"1 images for user 'me\n'"
    assert lines[1].startswith(f"'POST' '{PATH}' 200 0.")
    assert len(lines) == 2


def test_labels_are_few_whatever_clients_send(client):
    before = len(samples(client))
    for number in range(30):
        client.get(f"/nowhere/{number}")
        client.get(f"/jobs/{number}")
        client.request("BREW", f"/{number}", headers={"x": str(number)})
        client.post(PATH, json={"prompt": "a star", "model": str(number)})
    assert len(samples(client)) <= before + 8
