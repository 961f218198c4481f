"""Keys, origins, and bodies that are meant to harm."""

import base64
import contextlib
import json
import logging
import pathlib
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from serving import WAIT, png, running

from jaxdiff.core.errors import InputError
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.serve import access as access_module
from jaxdiff.serve.access import Access, is_loopback
from jaxdiff.serve.images import decode_base64, image_from_base64
from jaxdiff.serve.limits import Limits, check_no_files, lora_names
from jaxdiff.serve.server import ServerOptions, serve
from jaxdiff.serve.service import Service

PATH = "/v1/images/generations"
FIELDS = {"prompt": "a star"}


@pytest.fixture(scope="module")
def guarded(pipe):
    access = Access(keys=("first", "second"), origins=("https://page.example",))
    with running(lambda: pipe, access=access) as own:
        yield own


def test_every_endpoint_but_health_asks_for_a_key(guarded, server):
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert len(paths) > 20
    with guarded.client() as client:
        for path, methods in {**paths, "/openapi.json": ["get"], "/nowhere": ["get"]}.items():
            for method in methods:
                answer = client.request(method.upper(), path.replace("{", "").replace("}", ""))
                expected = 200 if path.startswith("/health/") else 401
                assert answer.status_code == expected, path
        assert client.get("/v1/models").headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer first"}, 200),
        ({"Authorization": "bearer second"}, 200),
        ({"Authorization": f"Basic {base64.b64encode(b'anyone:first').decode()}"}, 200),
        ({"X-API-Key": "second"}, 200),
        ({"Authorization": "Bearer firs"}, 401),
        ({"Authorization": "Bearer \xff".encode("latin-1")}, 401),
        ({"Authorization": "Basic !"}, 401),
        ({"Authorization": "first"}, 401),
        ({"Authorization": "Bearer wrong", "X-API-Key": "first"}, 401),
        ({}, 401),
    ],
)
def test_keys(guarded, headers, status):
    with guarded.client(headers=headers) as client:
        assert client.get("/v1/models").status_code == status


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(access_module.hmac, "compare_digest", lambda *pair: compared.append(pair))
    with pytest.raises(access_module.RequestError):
        Access(keys=("a", "b")).owner({"x-api-key": "c"})
    assert compared == [(b"c", b"a"), (b"c", b"b")]


def test_jobs_belong_to_a_key(guarded):
    first, second = ({"X-API-Key": key} for key in ("first", "second"))
    with guarded.client() as client:
        number = client.post("/jobs", json=FIELDS, headers=first).json()["id"]
        assert client.get(f"/jobs/{number}", headers=first).status_code == 200
        for path in (f"/jobs/{number}", f"/jobs/{number}/result"):
            assert client.get(path, headers=second).status_code == 404
        assert client.post(f"/jobs/{number}/cancel", headers=second).status_code == 404


def test_pages_from_elsewhere(guarded, server):
    page, other = ({"Origin": f"https://{name}.example"} for name in ("page", "other"))
    key = {"X-API-Key": "first"}
    with guarded.client() as client:
        answer = client.get("/v1/models", headers=page | key)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert client.get("/v1/models", headers=other | key).status_code == 403
        asked = {"Access-Control-Request-Method": "POST"}
        assert client.options("/v1/models", headers=page | asked).status_code == 200
    with server.client() as client:
        asked = page | {"Access-Control-Request-Method": "POST"}
        for answer in (client.get("/v1/models", headers=page), client.options(PATH, headers=asked)):
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
        assert client.get("/v1/models", headers={"Origin": server.url}).status_code == 200
        # a name of the page's own for this machine
        answer = client.get("/v1/models", headers={"Host": "evil.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_names_of_this_machine(host, expected):
    assert is_loopback(host) is expected


def test_a_warning_for_a_public_port_without_a_key():
    def load():
        raise InputError("enough")

    with (
        pytest.warns(UserWarning, match="host: got 0.0.0.0 without an API key"),
        pytest.raises(InputError, match="enough"),
    ):
        serve(Service(load), ServerOptions(port=0, access=Access(host="0.0.0.0")))


def post(client, body, path=PATH):
    return client.post(path, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"prompt": "a", "n": ' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"prompt": "a", "guidance_scale": NaN}',
        b'{"prompt": "a", "guidance_scale": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "\\u0000\\ud800"}',
        b"null",
        b"[]",
        b'"' + b"a" * 1000 + b'"',
    ],
    ids=range(13),
)
def test_json_that_is_none_or_worse(client, body):
    for path in (PATH, "/jobs", "/sdapi/v1/txt2img"):
        answer = post(client, body, path)
        assert answer.status_code in (400, 422), path
        assert answer.json()


def test_other_types_of_bodies(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        # what a page could send without asking first
        answer = client.post(PATH, content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert answer.status_code == 400
    answer = client.post("/v1/images/edits", json=FIELDS)
    assert answer.status_code == 400
    headers = {"content-type": "multipart/form-data"}
    assert client.post("/v1/images/edits", content=b"x", headers=headers).status_code == 400


def test_bodies_that_are_too_large(server, client):
    most = server.service.limits.max_json_bytes
    for path, size in ((PATH, most + 1), ("/jobs", 30 * 2**20), ("/v1/images/edits", 30 * 2**20)):
        body = b" " * size
        assert post(client, body, path).status_code == 413, path

        def parts(body=body):
            yield from (body[start : start + 2**16] for start in range(0, len(body), 2**16))

        if path == PATH:  # of unknown length
            assert post(client, parts(), path).status_code == 413


def test_a_body_that_does_not_come(server, monkeypatch):
    monkeypatch.setattr(access_module, "BODY_TIMEOUT_S", 0.05)
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=WAIT) as connection:
        connection.sendall(f"{head}Content-Length: 10\r\n\r\n{{".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def chunk(kind, data):
    """A part of a PNG file."""
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc


def bomb(width, height):
    """A PNG of very many pixels in few bytes."""

    rows = zlib.compress(b"\0" * 2**20, 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [101, 5000, 12_000, 100_000, 2**31 - 1])
def test_images_of_very_many_pixels(client, side):
    data = bomb(side, side)
    answer = client.post(
        "/v1/images/edits", files={"image": ("x.png", data)}, data={"prompt": "a star"}
    )
    assert answer.status_code == 400
    assert "expected at most 10000" in answer.text or "got no image" in answer.text
    fields = {"init_images": [base64.b64encode(data).decode()]}
    assert client.post("/sdapi/v1/img2img", json=fields).status_code == 422


def test_texts_of_very_many_characters_in_an_image(client):
    text = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * 2**27, 9))
    data = png(np.zeros((8, 8, 3), np.uint8))
    fields = {"image": base64.b64encode(data[:33] + text + data[33:]).decode()}
    assert client.post("/sdapi/v1/png-info", json=fields).status_code == 422


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_not_read(kind):
    data = base64.b64encode(png(np.zeros((8, 8, 3), np.uint8), kind)).decode()
    with pytest.raises(InputError, match="image: got no image, expected a PNG, JPEG or WebP"):
        image_from_base64("image", data, 100)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_images_are_sentences(seed):
    rng = np.random.default_rng(seed)
    kind = ("PNG", "JPEG", "WEBP")[seed % 3]
    data = bytearray(png(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8), kind))
    for _ in range(int(rng.integers(1, 20))):
        data[rng.integers(len(data))] = rng.integers(256)
    data = data[: rng.integers(len(data) // 2, len(data) + 1)]
    with contextlib.suppress(InputError):  # and nothing else
        image_from_base64("image", base64.b64encode(data).decode(), 10_000)


@pytest.mark.parametrize("text", ["", "x", "/etc/passwd", "http://x/y.png", "é", "YQ==\n", "a b"])
def test_what_is_no_base64(text):
    if text:
        with pytest.raises(InputError, match="image: got no base64"):
            decode_base64("image", text)
    with pytest.raises(InputError):
        image_from_base64("image", text, 100)


def test_no_request_names_a_file(pipe, client, monkeypatch, tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(path)
    for images in ({"image": path}, {"image": str(path)}, {"image": path, "mask": path}):
        (request,) = pipe.resolve("a star", **images)
        with pytest.raises(RuntimeError, match="names a file"):
            check_no_files(request)
    given, resolve = [], Pipeline.resolve

    def seen(self, *arguments, **options):
        given.append(options)
        return resolve(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "resolve", seen)
    opened = []
    monkeypatch.setattr(pathlib.Path, "open", lambda self, *_, **__: opened.append(self))
    for name in ("image", "mask", "original_image"):
        assert client.post("/jobs", json={**FIELDS, name: str(path)}).status_code == 400
    assert (given, opened) == ([], [])


def test_loras_by_name_alone(tmp_path):
    for name in ("ink.safetensors", ".hidden.safetensors", "notes.txt", "a;b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert lora_names(tmp_path) == ["folder", "ink"]
    assert lora_names(None) == []


def test_what_nobody_expects_is_a_number_in_the_log(client, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(Service, "resolve", fail)
    for path in (PATH, "/jobs", "/sdapi/v1/txt2img"):
        with caplog.at_level(logging.ERROR, "jaxdiff.serve"):
            answer = client.post(path, json=FIELDS)
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert "Traceback" not in answer.text
        body = answer.json()
        message = body["detail"] if "detail" in body else body["error"]["message"]
        number = message.split()[2].rstrip(",")
        assert any(number in record.getMessage() for record in caplog.records)


def test_paths_and_methods_that_are_not_there(client):
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/images/edits", 405),
        ("DELETE", "/jobs", 405),
        ("GET", "/sdapi/v1/x", 404),
        ("GET", "/%00%ff", 404),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status, path
        assert json.loads(answer.text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pixels": 0}, "max_pixels: got 0"),
        ({"max_images": 11}, "max_images: got 11"),
        ({"sizes": ("big",)}, "sizes: got 'big'"),
    ],
)
def test_limits_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        Limits(**options)


def test_a_list_of_sizes(pipe):
    with running(lambda: pipe, limits=Limits(sizes=("16x16", "32x16"))) as server:  # noqa: SIM117
        with server.client() as client:
            answer = client.post(PATH, json={**FIELDS, "size": "16x32"})
            assert answer.status_code == 400
            assert "size: got 16x32, expected one of 16x16, 32x16" in answer.text
            assert client.post(PATH, json={**FIELDS, "size": "32x16"}).status_code == 200
