"""LoRA names and factors: the tables of real trainers, closed forms, and what must be refused."""

import json
import pathlib

import numpy as np
import originals
import pytest

from jaxdiff.checkpoints.key_mapping import to_jax, torch_key_to_path
from jaxdiff.checkpoints.lora import read_lora
from jaxdiff.checkpoints.lora_products import LoRA
from jaxdiff.checkpoints.textual_inversion import read_inversion
from jaxdiff.core.errors import InputError

TABLES = pathlib.Path(__file__).parent / "lora"
UNET = {"unet": {"a.to_q.kernel": (4, 6), "a.conv.kernel": (3, 3, 4, 5), "a.to_q.bias": (6,)}}


def shapes(table: dict) -> dict:
    """A published model's weights by path, in our layout; shapes are told by an empty array."""
    found = {}
    for key, torch_shape in table.items():
        path = torch_key_to_path(f"{key}.weight", len(torch_shape))
        found[path] = to_jax(np.broadcast_to(np.int8(0), torch_shape), path).shape
    return found


def small(shape):
    """Factors of rank 1 that fit a weight of `shape` in PyTorch's layout."""
    rest = (1, 1) if len(shape) == 4 else ()
    return np.zeros((1, *shape[1:]), np.float16), np.zeros((shape[0], 1, *rest), np.float16)


def write(path, tensors):
    return originals.write_safetensors(path, tensors)


@pytest.mark.parametrize("name", sorted(p.stem for p in TABLES.glob("*.json")))
def test_every_kohya_name_of_a_published_model(tmp_path, name):
    """Each spelling of each weight finds that weight."""
    table = json.loads((TABLES / f"{name}.json").read_text())
    component = table["component"]
    modules = {key: tuple(shape) for key, (shape, _) in table["modules"].items()}
    for style in range(max(len(names) for _, names in table["modules"].values())):
        tensors = {}
        for shape, names in table["modules"].values():
            down, up = small(shape)
            stem = names[min(style, len(names) - 1)]
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = down, up
        path = write(tmp_path / f"{style}.safetensors", tensors)
        changes = read_lora(path, {component: shapes(modules)})
        assert changes.keys() == {component}
        assert {f"{key}.weight" for key in modules} == changes[component].keys()


RNG = np.random.default_rng(0)


def factor(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_a_matrix():
    down, up = factor(2, 4), factor(6, 2)
    got = LoRA(down=down, up=up, scale=0.5).delta(np.zeros((6, 4)))
    np.testing.assert_allclose(got, 0.5 * up @ down, rtol=1e-6)


def test_a_convolution_is_two_convolutions():
    """delta * x = up * (down * x) for every input patch (LoCon)."""
    down, up = factor(2, 4, 3, 3), factor(5, 2, 1, 1)
    got = LoRA(down=down, up=up, scale=2.0).delta(np.zeros((5, 4, 3, 3)))
    patch = factor(4, 3, 3)
    want = 2 * up[:, :, 0, 0] @ np.tensordot(down, patch, 3)
    np.testing.assert_allclose(np.tensordot(got, patch, 3), want, rtol=1e-5)


def test_a_tucker_convolution_is_three():
    down, mid, up = factor(2, 4, 1, 1), factor(3, 2, 3, 3), factor(5, 3, 1, 1)
    factors = LoRA(down=down, up=up, mid=mid)
    assert factors.fits((5, 4, 3, 3))
    patch = factor(4, 3, 3)
    inner = np.einsum("ri,ihw->rhw", down[:, :, 0, 0], patch)
    want = up[:, :, 0, 0] @ np.tensordot(mid, inner, 3)
    got = factors.delta(np.zeros((5, 4, 3, 3)))
    np.testing.assert_allclose(np.tensordot(got, patch, 3), want, rtol=1e-5)


def test_a_matrix_for_a_1x1_convolution_and_the_reverse():
    down, up = factor(2, 4), factor(6, 2)
    flat = LoRA(down=down, up=up)
    convolved = LoRA(down=down[..., None, None], up=up[..., None, None])
    for factors in (flat, convolved):
        assert factors.fits((6, 4))
        assert factors.fits((6, 4, 1, 1))
        assert not factors.fits((6, 5))
        assert not factors.fits((6, 4, 3, 3))
    weight = np.zeros((6, 4, 1, 1))
    np.testing.assert_array_equal(flat.delta(weight), convolved.delta(weight))


DOWN, UP = factor(2, 4), factor(6, 2)
PAIR = {"lora_unet_a_to_q.lora_down.weight": DOWN, "lora_unet_a_to_q.lora_up.weight": UP}


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_names_of_diffusers_before_peft(tmp_path, prefix):
    """Attention processors, and the text encoder's projections under the UNet's names."""
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    layer = "text_model.encoder.layers.0.self_attn"
    tensors = {
        f"{prefix}{block}.processor.to_q_lora.down.weight": DOWN,
        f"{prefix}{block}.processor.to_q_lora.up.weight": UP,
        f"{prefix}{block}.processor.to_out_lora.down.weight": DOWN,
        f"{prefix}{block}.processor.to_out_lora.up.weight": UP,
        f"text_encoder.{layer}.to_out_lora.down.weight": DOWN,
        f"text_encoder.{layer}.to_out_lora.up.weight": UP,
    }
    path = write(tmp_path / "x.safetensors", tensors)
    shapes = {
        "unet": {f"{block}.to_q.kernel": (4, 6), f"{block}.to_out.0.kernel": (4, 6)},
        "text_encoder": {f"{layer}.out_proj.kernel": (4, 6)},
    }
    changes = read_lora(path, shapes)
    assert changes["unet"].keys() == {f"{block}.to_q.weight", f"{block}.to_out.0.weight"}
    assert changes["text_encoder"].keys() == {f"{layer}.out_proj.weight"}


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1), (1.0, 0.5), (2.0, 1), (8.0, 4), (0.0, 1)])
def test_alpha_over_rank(tmp_path, alpha, scale):
    more = {} if alpha is None else {"lora_unet_a_to_q.alpha": np.array(alpha, np.float32)}
    path = write(tmp_path / "x.safetensors", PAIR | more)
    assert read_lora(path, UNET)["unet"]["a.to_q.weight"].scale == scale


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2), (True, 4 / 2**0.5)])
def test_an_adapter_of_peft(tmp_path, rslora, scale):
    prefix = "base_model.model.a.to_q"
    tensors = {f"{prefix}.lora_A.weight": DOWN, f"{prefix}.lora_B.weight": UP}
    write(tmp_path / "adapter_model.safetensors", tensors)
    settings = {"r": 2, "lora_alpha": 4, "use_rslora": rslora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert read_lora(tmp_path, UNET)["unet"]["a.to_q.weight"].scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_unet_b.lora_up.weight": factor(1, 1)}, r"names that fit nothing.*lora_unet_b.lora"),
        ({"lora_te_a.alpha": factor()}, "names that fit nothing"),
        (
            {"lora_unet_a_to_q.hada_w1_a": factor(1, 1)},
            "some are missing.*hada_w1_a, LoHa without hada_w1_b, hada_w2_a, hada_w2_b",
        ),
        ({"unet.a.to_q.lora_A.weight": factor(2, 4)}, "names that fit nothing"),
        (
            {"lora_unet_a_conv.lora_up.weight": factor(5, 2, 1, 1)},
            r"\(lora_unet_a_conv.lora_up.weight, LoRA without lora_unet_a_conv.lora_down.weight\)",
        ),
        (
            {"unet.a.conv.lora_A.weight": factor(2, 4, 3, 3)},
            r"got 1 \(unet.a.conv.lora_A.weight, LoRA without unet.a.conv.lora_B.weight\)",
        ),
        (
            {
                "lora_unet_a_conv.lora_up.weight": factor(5, 2, 1, 1),
                "lora_unet_a_conv.lora_down.weight": factor(2, 4, 5, 5),
            },
            r"factors that fit no weight.*a_conv.*got down \(2, 4, 5, 5\), up \(5, 2, 1, 1\), "
            r"expected factors of a weight \(5, 4, 3, 3\)",
        ),
        (
            {
                "lora_unet_a_conv.lora_up.weight": factor(5, 3, 1, 1),
                "lora_unet_a_conv.lora_down.weight": factor(2, 4, 3, 3),
            },
            "factors that fit no weight.*a_conv",
        ),
    ],
)
def test_what_fits_nothing_is_listed(tmp_path, more, message):
    path = write(tmp_path / "x.safetensors", PAIR | more)
    with pytest.raises(InputError, match=message):
        read_lora(path, UNET)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight", "x"], "got a whole model, expected a"),
        (["decoder.conv_in.weight"], "got a VAE, expected a LoRA"),
        (
            ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"],
            "a LoRA for FLUX.1, exp",
        ),
        (
            ["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"],
            "for FLUX.1, exp",
        ),
        (
            ["transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight"],
            "for FLUX.1, exp",
        ),
        (["transformer.transformer_blocks.0.attn.to_k.lora_A.weight"], "Stable Diffusion 3 or FL"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"], "Diffusion 3, expected one"),
        (["diffusion_model.blocks.0.cross_attn.q.lora_A.weight"], "for Wan, which is not"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, names, message):
    path = write(tmp_path / "x.safetensors", dict.fromkeys(names, factor(2, 4)))
    with pytest.raises(InputError, match=message):
        read_lora(path, UNET)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "a whole model"),
        ("3.conv.0.weight", "a V"),
    ],
)
def test_a_model_is_no_textual_inversion(tmp_path, name, kind):
    path = write(tmp_path / "x.safetensors", {name: factor(2, 4), "1.bias": factor(2)})
    with pytest.raises(InputError, match=f"got {kind}.*expected one embedding of one word"):
        read_inversion(path, {"text_encoder": 4})


def test_no_lora(tmp_path):
    with pytest.raises(InputError, match="expected a LoRA"):
        read_lora(tmp_path, UNET)
