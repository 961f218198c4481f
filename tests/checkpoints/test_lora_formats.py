"""Formats of adapters against closed forms in float64, and files that mix or break them."""

import json

import numpy as np
import originals
import pytest

from jaxdiff.checkpoints.lora import read_lora
from jaxdiff.core.errors import InputError

RNG = np.random.default_rng(0)
LINEAR, SQUARE, CONV = (6, 4), (4, 4), (6, 4, 3, 3)  # out, in, kernel
STEM = "lora_unet_a"


@pytest.fixture(autouse=True)
def same_numbers():
    """Whatever other tests have drawn."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def shapes(shape, bias=True):
    """A model of one layer, in its own layout."""
    own = {1: shape, 2: shape[::-1], 4: (*shape[2:], *shape[1::-1])}[len(shape)]
    table = {"a.scale" if len(shape) == 1 else "a.kernel": own}
    return {"unet": table | ({"a.bias": shape[:1]} if bias else {})}


def changes(folder, tensors, shape, stem=STEM, settings=None, **options):
    """The changes of the weight and bias of a layer by a file with these tensors of it."""
    name = "x" if settings is None else "adapter_model"
    named = {f"{stem}.{end}": np.asarray(array, np.float32) for end, array in tensors.items()}
    path = originals.write_safetensors(folder / f"{name}.safetensors", named)
    if settings is not None:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return read_lora(path, shapes(shape, **options))["unet"]


def check(folder, tensors, weight, want, **options):
    """Fail unless the file makes `want`, in float64, of `weight`."""
    found = changes(folder, tensors, weight.shape, **options)
    assert found.keys() == {"a.weight"}
    got = found["a.weight"].delta(weight)
    assert got.dtype == np.float32
    np.testing.assert_allclose(weight + got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want - weight).max() > 1e-2


def double(**arrays):
    return {name: array.astype(np.float64) for name, array in arrays.items()}


@pytest.mark.parametrize("shape", [LINEAR, CONV])
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1), (0.0, 1), (1.0, 0.5)])
def test_loha(tmp_path, shape, alpha, scale):
    columns = int(np.prod(shape[1:]))
    tensors = {
        f"hada_w{n}_{x}": draw(*s)
        for n in "12"
        for x, s in zip("ab", ((6, 2), (2, columns)), strict=True)
    }
    weight, d = draw(*shape), double(**tensors)
    product = (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"])
    more = {} if alpha is None else {"alpha": alpha}
    check(tmp_path, tensors | more, weight, weight + scale * product.reshape(shape))


def test_loha_of_tucker(tmp_path):
    tensors = {f"hada_t{n}": draw(2, 2, 3, 3) for n in "12"}
    tensors |= {f"hada_w{n}_{x}": draw(2, i) for n in "12" for x, i in (("a", 6), ("b", 4))}
    weight, d, want = draw(*CONV), double(**tensors), np.ones(CONV)
    for n in "12":
        factor = np.zeros(CONV)
        for r in range(2):
            for s in range(2):
                outer = np.outer(d[f"hada_w{n}_a"][r], d[f"hada_w{n}_b"][s])
                factor += outer[:, :, None, None] * d[f"hada_t{n}"][r, s]
        want = want * factor
    check(tmp_path, tensors, weight, weight + want)


def kron(one, two, shape):
    """Blocks of `two`, each times a number of `one`."""
    want = np.zeros(shape)
    o, i = two.shape[:2]
    for row in range(one.shape[0]):
        for column in range(one.shape[1]):
            place = slice(row * o, (row + 1) * o), slice(column * i, (column + 1) * i)
            want[place] = one[row, column] * two
    return want


@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_lokr_of_whole_factors_has_no_alpha(tmp_path, shape):
    tensors = {"lokr_w1": draw(3, 2), "lokr_w2": draw(2, 2, *shape[2:])}
    weight, d = draw(*shape), double(**tensors)
    want = weight + kron(d["lokr_w1"], d["lokr_w2"], shape)
    check(tmp_path, tensors | {"alpha": 1e9}, weight, want)


@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_lokr_of_pairs(tmp_path, shape):
    inner = 2 * int(np.prod(shape[2:]))
    tensors = {"lokr_w1_a": draw(3, 1), "lokr_w1_b": draw(1, 2)}
    tensors |= {"lokr_w2_a": draw(2, 1), "lokr_w2_b": draw(1, inner)}
    weight, d = draw(*shape), double(**tensors)
    two = (d["lokr_w2_a"] @ d["lokr_w2_b"]).reshape(2, 2, *shape[2:])
    want = weight + 3 * kron(d["lokr_w1_a"] @ d["lokr_w1_b"], two, shape)
    check(tmp_path, tensors | {"alpha": 3.0}, weight, want)


def test_lokr_of_peft_has_alpha(tmp_path):
    """Also of whole factors, whose rank is in the settings alone."""
    tensors = {"lokr_w1": draw(3, 2), "lokr_w2": draw(2, 2)}
    weight, d = draw(*LINEAR), double(**tensors)
    want = weight + 6 / 8 * kron(d["lokr_w1"], d["lokr_w2"], LINEAR)
    settings = {"peft_type": "LOKR", "alpha": 6, "r": 4, "rank_pattern": {"[ab]": 8}}
    check(tmp_path, tensors, weight, want, stem="base_model.model.a", settings=settings)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("shape", [LINEAR, SQUARE, CONV])
def test_glora(tmp_path, older, shape):
    o, i = shape[:2]
    a1, a2, b1, b2 = draw(i, 2), draw(2, i), draw(o, 2), draw(2, *shape[1:])
    weight, d = draw(*shape), double(a1=a1, a2=a2, b1=b1, b2=b2)
    mixed = np.tensordot(weight.astype(np.float64), d["a1"] @ d["a2"], ((1,), (0,)))
    mixed = np.moveaxis(mixed, -1, 1)
    want = weight + 1.5 * (mixed + np.tensordot(d["b1"], d["b2"], 1))
    names = ("a2", "a1", "b2", "b1") if older else ("a1", "a2", "b1", "b2")
    tensors = {f"{name}.weight": t for name, t in zip(names, (a1, a2, b1, b2), strict=True)}
    check(tmp_path, tensors | {"alpha": 3.0}, weight, want)


@pytest.mark.parametrize("shape", [LINEAR, SQUARE, CONV])
@pytest.mark.parametrize("on_input", [0, 1])
def test_ia3(tmp_path, shape, on_input):
    vector, weight = draw(shape[on_input]), draw(*shape)
    axes = [1, -1] if on_input else [-1, 1]
    want = weight * (1 + vector.reshape(axes + [1] * (len(shape) - 2)).astype(np.float64))
    check(tmp_path, {"weight": vector, "on_input": on_input}, weight, want)


def test_ia3_without_its_axis_is_of_rows_if_it_fits(tmp_path):
    for shape, axis in ((SQUARE, 0), (LINEAR, 0), (LINEAR, 1)):
        vector, weight = draw(shape[axis]), draw(*shape)
        along = vector[None] if axis else vector[:, None]
        check(tmp_path, {"weight": vector}, weight, weight * (1 + along.astype(np.float64)))


def test_ia3_of_peft_multiplies_the_output_with_its_bias(tmp_path):
    vector, weight, bias = draw(6, 1), draw(*LINEAR), draw(6)
    found = changes(tmp_path, {"ia3_l": vector}, LINEAR, stem="base_model.model.a")
    got = weight + found["a.weight"].delta(weight)
    np.testing.assert_allclose(got, weight * vector, rtol=1e-5, atol=1e-6)
    got = bias + found["a.bias"].delta(bias)
    np.testing.assert_allclose(got, bias * vector[:, 0], rtol=1e-5, atol=1e-6)
    found = changes(tmp_path, {"ia3_l": draw(1, 4)}, LINEAR, stem="base_model.model.a")
    assert found.keys() == {"a.weight"}


def rotation(angle):
    """Cayley's transform of ((0, t), (-t, 0)) is a rotation whose half angle has the tangent t."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


@pytest.mark.parametrize("shape", [LINEAR, CONV])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_oft(tmp_path, shape, rescaled, alpha):
    angles, weight, rescale = np.array([0.9, -0.5, 0.3]), draw(*shape), draw(6)
    tangents = np.tan(angles / 2)
    blocks = np.zeros((3, 2, 2))
    blocks[:, 0, 1] = tangents
    if alpha:
        norm = np.sqrt(2 * np.sum(tangents**2))
        angles = 2 * np.arctan(tangents * min(1, alpha * 6 / norm))
        assert norm > alpha * 6
    rows = weight.astype(np.float64).reshape(3, 2, -1)
    want = np.stack([rotation(t).T @ pair for t, pair in zip(angles, rows, strict=True)])
    want = want.reshape(6, -1) * (rescale[:, None] if rescaled else 1)
    tensors = {"oft_blocks": blocks, "alpha": alpha} | ({"rescale": rescale} if rescaled else {})
    check(tmp_path, tensors, weight, want.reshape(shape))


def test_boft_of_one_stage_turns_neighbours(tmp_path):
    angles, weight = RNG.uniform(-1, 1, 4), draw(8, 4)
    blocks = np.zeros((2, 4, 2, 2))
    blocks[0, :, 0, 1] = np.tan(angles / 2)
    want = weight.astype(np.float64).copy()
    for n, angle in enumerate(angles):  # the second stage turns by nothing
        want[2 * n : 2 * n + 2] = rotation(angle) @ want[2 * n : 2 * n + 2]
    check(tmp_path, {"oft_blocks": blocks}, weight, want)
    blocks = blocks[::-1]
    want = weight.astype(np.float64).copy()
    for n, angle in enumerate(angles):  # rows two apart
        rows = [4 * (n // 2) + n % 2, 4 * (n // 2) + n % 2 + 2]
        want[rows] = rotation(angle) @ want[rows]
    check(tmp_path, {"oft_blocks": blocks}, weight, want)


@pytest.mark.parametrize("count", [2, 1])
def test_oft_of_peft(tmp_path, count):
    """Of columns, and by the inverse rotations; one block may serve all."""
    angles, weight = RNG.uniform(-1, 1, count), draw(*LINEAR)
    tensors = {"oft_R.weight": np.tan(angles / 2)[:, None]}
    columns = weight.astype(np.float64).reshape(6, 2, 2)
    turns = np.stack([rotation(angle) for angle in np.resize(angles, 2)])
    want = np.einsum("okc,kcr->okr", columns, turns).reshape(6, 4)
    settings = {"oft_block_size": 2, "use_cayley_neumann": False}
    check(tmp_path, tensors, weight, want, stem="base_model.model.a", settings=settings)


@pytest.mark.parametrize("shape", [LINEAR, CONV])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("inner", ["LoRA", "full"])
def test_dora(tmp_path, shape, columns, inner):
    """Rows, or columns, of the changed weight have the stated norms."""
    weight, norms = draw(*shape), RNG.uniform(1, 2, shape[columns])
    if inner == "LoRA":
        tensors = {
            "lora_down.weight": draw(2, *shape[1:]),
            "lora_up.weight": draw(6, 2, *(1,) * (len(shape) - 2)),
        }
        delta = tensors["lora_up.weight"].reshape(6, 2) @ tensors["lora_down.weight"].reshape(2, -1)
        tensors["alpha"], delta = 4.0, 2 * delta
    else:
        tensors = {"diff": draw(*shape)}
        delta = tensors["diff"]
    axis = [1] * len(shape)
    axis[columns] = -1
    changed = weight.astype(np.float64) + delta.reshape(shape)
    others = tuple(n for n in range(len(shape)) if n != columns)
    changed /= np.sqrt(np.sum(changed**2, others, keepdims=True))
    want = changed * norms.reshape(axis)
    check(tmp_path, tensors | {"dora_scale": norms.reshape(axis)}, weight, want)


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
def test_dora_of_peft_is_of_rows(tmp_path, end):
    weight, norms = draw(*CONV), RNG.uniform(1, 2, 6)
    tensors = {"lora_A.weight": draw(2, 4, 3, 3), "lora_B.weight": np.zeros((6, 2, 1, 1))}
    rows = weight.astype(np.float64).reshape(6, -1)
    want = rows / np.linalg.norm(rows, axis=1)[:, None] * norms[:, None]
    tensors[end] = norms.reshape(1, 6, 1, 1)
    check(tmp_path, tensors, weight, want.reshape(CONV), stem="unet.a")


def test_differences_of_weights_biases_and_norms(tmp_path):
    tensors = {"diff": draw(*LINEAR), "diff_b": draw(6)}
    found = changes(tmp_path, tensors, LINEAR)
    np.testing.assert_array_equal(found["a.weight"].delta(draw(*LINEAR)), tensors["diff"])
    np.testing.assert_array_equal(found["a.bias"].delta(draw(6)), tensors["diff_b"])
    tensors = {"w_norm": draw(6), "b_norm": draw(6)}
    found = changes(tmp_path, tensors, (6,))
    np.testing.assert_array_equal(found["a.weight"].delta(draw(6)), tensors["w_norm"])
    np.testing.assert_array_equal(found["a.bias"].delta(draw(6)), tensors["b_norm"])


def test_a_bias_of_lora_has_its_scale(tmp_path):
    tensors = {"lora_A.weight": draw(2, 4), "lora_B.weight": draw(6, 2), "lora_B.bias": draw(6)}
    settings = {"lora_alpha": 3, "r": 2}
    found = changes(tmp_path, tensors, LINEAR, stem="base_model.model.a", settings=settings)
    np.testing.assert_allclose(found["a.bias"].delta(draw(6)), 1.5 * tensors["lora_B.bias"])


@pytest.mark.parametrize(
    "stem",
    [
        "unet.a",
        "base_model.model.a",
        "lora_unet_a",
        "oft_unet_a",
        "lycoris_a",
        "diffusion_model.a",
    ],
)
def test_every_writer_may_have_every_format(tmp_path, stem):
    found = changes(
        tmp_path,
        {
            "hada_w1_a": draw(6, 2),
            "hada_w1_b": draw(2, 4),
            "hada_w2_a": draw(6, 2),
            "hada_w2_b": draw(2, 4),
        },
        LINEAR,
        stem=stem,
    )
    assert found.keys() == {"a.weight"}


def test_names_of_comfyui(tmp_path):
    """Blocks as the original layout counts them, and text encoders as transformers has them."""
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {}
    for stem in (
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        f"text_encoders.clip_l.transformer.{layer}",
        f"text_encoders.clip_g.transformer.{layer}",
    ):
        tensors |= {f"{stem}.lora_A.weight": draw(2, 4), f"{stem}.lora_B.weight": draw(6, 2)}
    path = originals.write_safetensors(tmp_path / "x.safetensors", tensors)
    text = {f"{layer}.kernel": (4, 6)}
    unet = {f"{block}.kernel": (4, 6), "down_blocks.0.resnets.0.norm1.scale": (4,)}
    model = {"unet": unet, "text_encoder": text, "text_encoder_2": text}
    found = read_lora(path, model)
    assert {name: set(keys) for name, keys in found.items()} == {
        "unet": {f"{block}.weight"},
        "text_encoder": {f"{layer}.weight"},
        "text_encoder_2": {f"{layer}.weight"},
    }


LORA = {"lora_down.weight": draw(2, 4), "lora_up.weight": draw(6, 2)}
LOHA = {"hada_w1_a": draw(6, 2), "hada_w1_b": draw(2, 4), "hada_w2_a": draw(6, 2)}


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (LOHA, {}, r"some are missing: got 1 \(lora_unet_a.hada_w1_a, LoHa without hada_w2_b\)"),
        (LOHA | {"hada_w2_b": draw(2, 5)}, {}, "hada_w1_a, LoHa"),
        (LOHA | {"hada_w2_b": draw(2)}, {}, "hada_w1_a, LoHa"),
        (LOHA | {"hada_w2_b": draw(2, 4), "hada_t1": draw(2, 2, 3, 3)}, {}, ", LoHa"),
        (LORA | {"diff": draw(6, 4)}, {}, "a.diff, full"),
        (LORA | {"hada_w1_a": draw(6, 2)}, {}, "hada_w1_a, LoHa"),
        (LORA | {"dora_scale": draw(5, 1)}, {}, "dora_scale, DoRA"),
        ({"dora_scale": draw(6, 1)}, {}, "dora_scale, DoRA"),
        (LORA | {"dora_scale": draw(6, 1), "lora_magnitude_vector": draw(6)}, {}, ", DoRA"),
        (LORA | {"diff_b": draw(6)}, {"bias": False}, "a.diff_b, full"),
        (LORA | {"diff_b": draw(5)}, {}, "a.diff_b, full"),
        ({"lokr_w1": draw(3, 2)}, {}, "lokr_w1, LoKr"),
        ({"lokr_w1": draw(3, 2), "lokr_w2": draw(2, 3)}, {}, ", LoKr"),
        ({"lokr_w1": draw(2, 3), "lokr_w2": draw(3, 2)}, {}, ", LoKr"),
        ({"oft_blocks": draw(2, 2, 2)}, {}, "oft_blocks, OFT"),
        ({"oft_blocks": draw(3, 2)}, {}, "oft_blocks, OFT"),
        ({"oft_blocks": draw(2, 3, 2, 2)}, {}, "oft_blocks, BOFT"),
        ({"a1.weight": draw(4, 2), "a2.weight": draw(2, 4)}, {}, "a1.weight, GLoRA"),
        ({"weight": draw(5)}, {}, r"a.weight, \(IA\)\^3"),
        ({"alpha": 1.0}, {}, "a.alpha"),
        ({"lora_down.weight": draw(), "lora_up.weight": draw()}, {}, "lora_down.weight, LoRA"),
        ({"lora_down.weight": draw(0, 4), "lora_up.weight": draw(6, 0)}, {}, ", LoRA"),
        ({"lora_embedding_A": draw(2, 4)}, {}, "lora_embedding_A: got embedding factors, expected"),
        (LORA | {"lora_E": draw(2, 1)}, {}, "a.lora_E: got AdaLoRA, expected"),
        ({"boft_R": draw(2, 2)}, {}, "boft_R: got BOFT of PEFT, expected"),
        (LORA | {"nonsense": draw(2)}, {}, r"fit nothing in this model: got 1 .*nonsense"),
        ({"oft_R.weight": draw(2, 1)}, {}, "a: got OFT without PEFT's settings"),
        (
            {"oft_R.weight": draw(2, 1)},
            {"settings": {"r": 2, "coft": True}},
            "a: got coft true, expected false",
        ),
        (
            {"oft_R.weight": draw(2, 2)},
            {"settings": {"r": 2}},
            "oft_R.weight, OFT",
        ),
        (LORA | {"alpha": np.inf}, {}, "a: got the scale inf, expected a number"),
    ],
)
def test_what_cannot_be_is_a_sentence(tmp_path, tensors, options, message):
    with pytest.raises(InputError, match=message) as raised:
        changes(tmp_path, tensors, LINEAR, **options)
    assert "\n" not in str(raised.value)
