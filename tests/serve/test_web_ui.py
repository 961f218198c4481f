"""A1111's API, by the fields that its clients send."""

import base64
import concurrent.futures
import json

import numpy as np
import pytest
from serving import image_of, png, wait_for

from jaxdiff.pipeline import image_inputs

COLOURS = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)
HOLE = np.zeros((16, 16), bool)
HOLE[4:12, 4:12] = True


def text_of(array):
    return base64.b64encode(png(array)).decode()


def close(image, expected):
    return np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_text_to_image(pipe, client):
    fields = {
        "prompt": "a star",
        "negative_prompt": "a circle",
        "seed": 7,
        "steps": 3,
        "cfg_scale": 2,
        "width": 16,
        "height": 32,
        "sampler_name": "DPM++ 2M",
        "scheduler": "Karras",
        "batch_size": 2,
        "n_iter": 2,
        "subseed": -1,
        "subseed_strength": 0,
        "override_settings": {"CLIP_stop_at_last_layers": 2, "sd_model_checkpoint": "tiny"},
        "alwayson_scripts": {},
        "save_images": False,
    }
    answer = client.post("/sdapi/v1/txt2img", json=fields)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    plain = pipe(
        "a star",
        negative_prompt="a circle",
        seed=[7, 8, 9, 10],
        steps=3,
        guidance_scale=2.0,
        width=16,
        height=32,
        sampler="dpmpp-2m",
        timestep_spacing="karras",
        clip_skip=1,
        output="numpy",
    )
    images = [image_of(each) for each in body["images"]]
    assert len(images) == 4
    for own, expected in zip(images, plain.images, strict=True):
        assert close(own, expected)
    assert {name: body["parameters"][name] for name in fields} == fields
    info = json.loads(body["info"])
    assert info["all_seeds"] == [7, 8, 9, 10]
    assert (info["seed"], info["steps"], info["width"], info["height"]) == (7, 3, 16, 32)
    assert info["sampler_name"] == "DPM++ 2M"
    assert info["infotexts"] == [own.info["parameters"] for own in images]
    assert "Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 2, Seed: 7" in info["infotexts"][0]
    read = client.post("/sdapi/v1/png-info", json={"image": body["images"][0]}).json()
    assert read["info"] == info["infotexts"][0]


def test_seeds_are_random_where_they_are_minus_one(client):
    fields = {"prompt": "a star", "seed": -1, "width": 16, "height": 16}
    infos = [json.loads(client.post("/sdapi/v1/txt2img", json=fields).json()["info"])
             for _ in range(2)]  # fmt: skip
    assert infos[0]["seed"] != infos[1]["seed"]


@pytest.mark.parametrize("inverted", [None, 1])
def test_image_to_image_with_a_mask(pipe, client, inverted):
    fields = {
        "prompt": "a star",
        "init_images": ["data:image/png;base64," + text_of(COLOURS)],
        "mask": text_of(np.where(HOLE, 255, 0).astype(np.uint8)),
        "inpainting_mask_invert": inverted,
        "denoising_strength": 0.5,
        "steps": 4,
        "seed": 1,
        "inpaint_full_res": False,
        "inpainting_fill": 1,
        "mask_blur": 4,
        "sampler_name": "Euler a",
    }
    answer = client.post("/sdapi/v1/img2img", json=fields)
    assert answer.status_code == 200, answer.text
    mask = ~HOLE if inverted else HOLE
    plain = pipe(
        "a star", image=COLOURS, mask=mask, strength=0.5, steps=4, seed=1, output="numpy",
        sampler="euler-ancestral",
    )  # fmt: skip
    assert close(image_of(answer.json()["images"][0]), plain.images[0])
    assert "init_images" not in answer.json()["parameters"]


def test_images_of_other_sizes_are_resized_or_cropped(client):
    wide = np.concatenate([COLOURS, COLOURS], axis=1)
    fields = {"prompt": "a star", "init_images": [text_of(wide)], "seed": 1, "steps": 4}
    sizes, found = [], []
    for more in ({}, {"width": 16, "height": 16}, {"width": 16, "height": 16, "resize_mode": 1}):
        answer = client.post("/sdapi/v1/img2img", json={**fields, **more})
        image = image_of(answer.json()["images"][0])
        sizes.append(image.size)
        found.append(np.asarray(image))
    assert sizes == [(32, 16), (16, 16), (16, 16)]
    assert not np.array_equal(found[1], found[2])


@pytest.mark.parametrize("upscaler", [None, "Lanczos", "Nearest"])
def test_the_hires_fix(pipe, client, upscaler):
    fields = {
        "prompt": "a star",
        "seed": 3,
        "steps": 3,
        "enable_hr": True,
        "hr_scale": 2,
        "hr_second_pass_steps": 4,
        "denoising_strength": 0.5,
        "width": 16,
        "height": 16,
    }
    if upscaler is not None:
        fields["hr_upscaler"] = upscaler
    answer = client.post("/sdapi/v1/txt2img", json=fields)
    assert answer.status_code == 200, answer.text
    found = image_of(answer.json()["images"][0])
    assert found.size == (32, 32)
    if upscaler is None:
        first = pipe("a star", seed=3, steps=3, output="latent").images
        latents = image_inputs.enlarge(np.asarray(first), 16, 16)
        options = {"seed": 3, "steps": 4, "strength": 0.5, "output": "numpy"}
        assert close(found, pipe("a star", image=latents, **options).images[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tiling": True}, "tiling: got True, which this server cannot do"),
        ({"restore_faces": True}, "restore_faces: got True"),
        ({"styles": ["film"]}, "styles: got ['film']"),
        ({"subseed_strength": 0.5}, "subseed_strength: got 0.5"),
        ({"refiner_checkpoint": "xl"}, "refiner_checkpoint: got 'xl'"),
        ({"script_name": "xyz"}, "script_name: got 'xyz'"),
        ({"alwayson_scripts": {"ControlNet": {"args": [1]}}}, "alwayson_scripts: got 'ControlNet'"),
        ({"save_images": True}, "save_images: got True"),
        ({"sampler_name": "Best"}, "sampler_name: got 'Best', expected one of Euler"),
        ({"scheduler": "Best"}, "scheduler: got 'Best', expected one of Automatic, Karras"),
        ({"s_churn": 5, "sampler_name": "DDIM"}, "s_churn: got Sigma churn with sampler ddim"),
        ({"batch_size": 4, "n_iter": 3}, "batch_size * n_iter: got 12"),
        ({"width": 17, "height": 16}, "width: got 17"),
        ({"width": 4096, "height": 4096}, "size: got 4096x4096"),
        ({"steps": 41}, "steps: got 41"),
        ({"seed": -2}, "seed: got -2"),
        ({"prompt": "a <lora:ink:1>"}, "<lora:ink:1>"),
        ({"prompt": "a" * 201}, "prompt: got 201 characters"),
        ({"override_settings": {"sd_model_checkpoint": "x"}}, "sd_model_checkpoint: got 'x'"),
        ({"override_settings": {"sd_hypernetwork": "x"}}, "which is unknown here"),
        ({"hr_scale": 3}, "hr_scale: got it without enable_hr"),
        ({"enable_hr": True, "hr_scale": 8}, "size: got 128x128"),
        ({"enable_hr": True, "hr_upscaler": "ESRGAN"}, "hr_upscaler: got 'ESRGAN'"),
        ({"enable_hr": True, "hr_resize_x": 32}, "hr_resize_x: got one of"),
        ({"enable_hr": True, "hr_prompt": "b"}, "hr_prompt: got 'b'"),
        ({"unheard_of": 1}, "unheard_of: got an unknown field"),
    ],
)
def test_what_is_not_honoured_gets_a_sentence(client, fields, message):
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a star", **fields})
    assert answer.status_code == 422
    assert message in answer.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_images": []}, "init_images"),
        ({"init_images": ["/etc/passwd"]}, "init_images: got no base64"),
        ({"init_images": ["file:///etc/passwd"]}, "init_images: got no base64"),
        ({"init_images": ["http://localhost/x.png"]}, "init_images: got no base64"),
        ({"init_images": ["cGF0aA=="]}, "init_images: got no image"),
        ({"mask": "/etc/passwd"}, "mask: got no base64"),
        ({"inpaint_full_res": True}, "inpaint_full_res: got True"),
        ({"inpainting_fill": 2}, "inpainting_fill: got 2"),
        ({"mask_blur": 8}, "mask_blur: got 8"),
        ({"resize_mode": 3}, "resize_mode: got 3"),
        ({"inpainting_mask_invert": 1}, "inpainting_mask_invert: got it without a mask"),
    ],
)
def test_images_that_are_not_honoured_get_a_sentence(client, fields, message):
    body = {"prompt": "a star", "init_images": [text_of(COLOURS)], **fields}
    answer = client.post("/sdapi/v1/img2img", json=body)
    assert answer.status_code == 422
    assert message in answer.json()["detail"]


def test_churn(pipe, client):
    fields = {"prompt": "a star", "seed": 1, "steps": 4, "sampler_name": "Euler", "s_churn": 2}
    answer = client.post("/sdapi/v1/txt2img", json={**fields, "width": 16, "height": 16})
    plain = pipe("a star", seed=1, steps=4, sampler="euler:s_churn=2", output="numpy").images[0]
    assert close(image_of(answer.json()["images"][0]), plain)


def test_lists(client):
    def get(name):
        answer = client.get(f"/sdapi/v1/{name}")
        assert answer.status_code == 200
        return answer.json()

    samplers = {each["name"] for each in get("samplers")}
    assert {"Euler a", "DPM++ 2M", "UniPC", "flow-sde"} <= samplers
    schedulers = {each["label"] for each in get("schedulers")}
    assert {"Automatic", "Karras", "SGM Uniform"} <= schedulers
    for name in samplers:
        for scheduler in ("Automatic", "Karras"):
            fields = {"sampler_name": name, "scheduler": scheduler, "steps": 41}
            answer = client.post("/sdapi/v1/txt2img", json=fields)
            assert "steps: got 41" in answer.json()["detail"], name
    assert [each["name"] for each in get("upscalers")] == ["None", "Lanczos", "Nearest"]
    assert [each["title"] for each in get("sd-models")] == ["tiny"]
    assert get("loras") == [{"name": "ink", "alias": "ink", "path": "ink", "metadata": {}}]
    assert get("embeddings") == {"loaded": {}, "skipped": {}}
    assert get("options")["sd_model_checkpoint"] == "tiny"
    assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "tiny"}).json() is None
    answer = client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "other"})
    assert (answer.status_code, answer.json()["error"]) == (422, "Unprocessable Entity")
    answer = client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2})
    assert answer.status_code == 422


def test_progress_and_interrupt(client, gate):
    def progress():
        return client.get("/sdapi/v1/progress").json()

    assert progress()["progress"] == 0
    fields = {"prompt": "a star", "steps": 20, "width": 16, "height": 16, "batch_size": 3}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/sdapi/v1/txt2img", json=fields)
        assert gate.entered.wait(60)
        state = progress()["state"]
        assert (state["job_count"], state["job_no"], state["interrupted"]) == (3, 0, False)
        assert client.post("/sdapi/v1/interrupt").status_code == 200
        gate.set()
        body = answer.result(60).json()
    assert body["images"] == []
    wait_for(lambda: progress()["state"]["job_count"] == 0)


def test_an_image_on_the_way(client, monkeypatch):
    from jaxdiff.generation import engine
    from jaxdiff.pipeline.slots import Slots

    monkeypatch.setattr(engine, "chunk_length", lambda *_, **__: 1)
    seen, run = [], Slots.run

    def slow(self, steps):
        seen.append(client.get("/sdapi/v1/progress").json())
        return run(self, steps)

    monkeypatch.setattr(Slots, "run", slow)
    fields = {"prompt": "a star", "steps": 6, "width": 16, "height": 16}
    assert client.post("/sdapi/v1/txt2img", json=fields).status_code == 200
    fractions = [each["progress"] for each in seen]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) == 6
    images = [each["current_image"] for each in seen if each["current_image"]]
    assert images
    assert image_of(images[0]).size == (16, 16)
