"""Images that share slots, each at a noise level of its own, on a tiny model."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from jaxdiff.pipeline import slots as slots_module
from jaxdiff.pipeline.output import Settings
from jaxdiff.pipeline.slots import Slots

PROMPTS = ["a small red circle", "a blue star", "a large green ring"]
SIZE = 4


def run_alone(pipe, image, chunk=2):
    slots = Slots(pipe.stages, SIZE)
    slots.admit([(0, image)])
    while True:
        slots.run(chunk)
        for _, _, latents in slots.take_finished():
            return latents


def run_together(pipe, images, rng):
    """All of the images in slots that they enter in a random order, at random moments."""
    slots, order, found = Slots(pipe.stages, SIZE), list(rng.permutation(len(images))), {}
    while order or slots.tickets:
        entering = min(int(rng.integers(0, 3)), slots.free, len(order))
        if not slots.tickets:
            entering = max(entering, 1)
        if entering:
            slots.admit([(i, images[i]) for i in order[:entering]])
            order = order[entering:]
        slots.run(int(rng.integers(1, 4)))
        found |= {ticket: latents for ticket, _, latents in slots.take_finished()}
    return [found[i] for i in range(len(images))]


def requests_of(pipe, **options):
    """Seven requests with steps, scales and seeds of their own."""
    return [
        pipe.resolve(
            PROMPTS[i % 3], seed=i, steps=2 + 2 * (i % 4), guidance_scale=1.5 + i, **options
        )[0]
        for i in range(7)
    ]


def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "dpmpp-2m-sde"},
        {"guidance": "apg:momentum=-0.5+interval:lo=0.3,hi=5"},
        {"image": image(), "strength": 0.6},
        {"image": image(), "mask": image().convert("L")},
    ],
    ids=["defaults", "noise in the steps", "modes", "image", "mask"],
)
def test_an_image_has_the_same_bits_whoever_shares_its_slots(one_device, options):
    requests = requests_of(one_device, **options)
    images = one_device.preparer().prepare(requests, Settings())
    assert len({image.key for image in images}) == 1
    alone = [run_alone(one_device, image) for image in images]
    together = run_together(one_device, images, np.random.default_rng(1))
    for mine, own in zip(together, alone, strict=True):
        np.testing.assert_array_equal(mine, own)
    plain = one_device.generate(requests, output="latent").images
    np.testing.assert_allclose(np.stack(together), plain, rtol=2e-5, atol=2e-5)


def test_devices_share_the_slots(pipe):
    requests = requests_of(pipe)
    images = pipe.preparer().prepare(requests, Settings())
    slots = Slots(pipe.stages, SIZE)
    assert slots.size == 8  # a multiple of the devices
    slots.admit(list(enumerate(images)))
    found = {}
    while slots.tickets:
        slots.run(3)
        found |= {ticket: latents for ticket, _, latents in slots.take_finished()}
    plain = pipe.generate(requests, output="latent").images
    np.testing.assert_allclose([found[i] for i in range(7)], plain, rtol=2e-5, atol=2e-5)


def test_what_cannot_share_slots_has_another_key(single):
    (base,) = single.resolve("a blue star", steps=3)
    others = {
        "size": {"height": 32},
        "streams": {"guidance_scale": 1.0},
        "sampler": {"sampler": "euler"},
        "rule": {"guidance": "cfg+rescale:phi=0.5"},
        "image": {"image": image()},
        "length of the prompt": {"prompt": "a blue star " * 30},
    }
    requests = [base] + [
        single.resolve(**{"prompt": "a blue star", "steps": 3, **own})[0] for own in others.values()
    ]
    keys = {image.key for image in single.preparer().prepare(requests, Settings())}
    assert len(keys) == len(requests)


def test_steps_chunks_and_company_compile_nothing(single):
    images = single.preparer().prepare(requests_of(single), Settings())
    run_together(single, images, np.random.default_rng(0))
    compiled = single.stages.compilations
    run_together(single, images, np.random.default_rng(3))
    assert single.stages.compilations == compiled


def test_equal_texts_are_encoded_once(single, monkeypatch):
    rows, encode = [], type(single.stages).encode_text

    def counted(self, prompts, *, skip):
        rows.append(len(prompts.zero_out))
        return encode(self, prompts, skip=skip)

    monkeypatch.setattr(type(single.stages), "encode_text", counted)
    preparer, requests = single.preparer(), requests_of(single)
    first = preparer.prepare(requests, Settings())
    assert len(rows) == 3  # prompts, each on the one device by itself
    second = preparer.prepare([dataclasses.replace(r, seed=9) for r in requests], Settings())
    assert len(rows) == 3
    for a, b in zip(first, second, strict=True):
        for name, value in a.inputs.conditioning.main.items():
            np.testing.assert_array_equal(value, b.inputs.conditioning.main[name])
    monkeypatch.setattr(slots_module, "CACHED_TEXTS", 0)
    preparer.prepare([dataclasses.replace(requests[0], prompt="a black cross")], Settings())
    preparer.prepare(requests[:1], Settings())
    assert len(rows) == 5  # nothing is kept beyond the bound


def test_new_weights_encode_again(single):
    preparer, (request,) = single.preparer(), single.resolve("a blue star")
    preparer.prepare([request], Settings())
    single.stages.weights_version += 1  # as `set_weights` does
    (key,) = preparer._texts
    assert preparer._text_key(preparer.prepare([request], Settings())[0].rule, request) != key


def test_who_leaves_makes_room(single):
    images = single.preparer().prepare(requests_of(single), Settings())
    slots = Slots(single.stages, 2)
    slots.admit([("a", images[2]), ("b", images[3])])
    slots.run(1)
    assert slots.free == 0
    assert slots.position("a") == (1, 6)
    slots.remove("a")
    assert (slots.free, slots.tickets) == (1, ["b"])
    slots.admit([("c", images[0])])
    slots.run(2)
    ((ticket, _, latents),) = slots.take_finished()
    assert ticket == "c"
    np.testing.assert_array_equal(latents, run_alone_of(single, images[0], 2))


def run_alone_of(pipe, image, size):
    slots = Slots(pipe.stages, size)
    slots.admit([(0, image)])
    slots.run(100)
    return slots.take_finished()[0][2]
