"""LoRAs of SD3, FLUX.1 and Chroma: every spelling against changes of the original weights.

The tables of published networks say what diffusers has made of each original tensor, and so what a
change of an original tensor is there.
"""

import jax.numpy as jnp
import numpy as np
import original_keys
import originals
import pytest

from jaxdiff.checkpoints.key_mapping import to_jax, torch_key_to_path
from jaxdiff.checkpoints.lora import read_lora
from jaxdiff.checkpoints.lora_names import parse, unflatten_key
from jaxdiff.checkpoints.safetensors import read_table, read_tensor
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.pipeline.lora import weight_changes

NETWORKS = ["flux_dev", "chroma", "sd3_medium", "sd35_medium"]


def few_blocks(name):
    """Whether a tensor is not in a block, or in one of the first or last few."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return not name.startswith(("double_", "single_", "joint_")) or numbers[0] in (0, 1, 18, 23, 37)


class Model:
    """A narrow network with a published one's names: weights in the original code and here."""

    def __init__(self, name):
        self.table = original_keys.oracle(name)
        self.original = {
            key: array
            for key, array in original_keys.small_arrays(self.table).items()
            if key != "pos_embed"
        }
        self.table = {**self.table, "map": dict(self.table["map"])}
        self.table["map"].pop("pos_embed.pos_embed", None)
        self.weights = {
            path: jnp.asarray(array) for path, array in self.here(self.original).items()
        }
        self.shapes = {path: array.shape for path, array in self.weights.items()}
        # Of the original code's linear layers.
        self.modules = [
            key.removesuffix(".weight")
            for key, array in self.original.items()
            if key.endswith(".weight") and array.ndim == 2
        ]

    def here(self, arrays):
        """Original arrays by path and in the layout of the network here."""
        found = {}
        for key, values in original_keys.converted(self.table, arrays).items():
            path = torch_key_to_path(key, values.ndim)
            found[path] = to_jax(values, path)
        return found

    def changed_by(self, path):
        """The changes that a file makes, by path."""
        changes = read_lora(path, {"transformer": self.shapes})["transformer"]
        keyed = {}
        for target, change in changes.items():
            keyed[(target,) if isinstance(target, str) else target] = [(1.0, change)]
        found = weight_changes(keyed, self.weights)
        return {path: to_jax(delta, path) for path, delta in found}

    def check(self, path, deltas):
        """Fail unless a file makes these changes of original tensors, and no others."""
        got = self.changed_by(path)
        zeros = {key: np.zeros_like(array) for key, array in self.original.items()}
        want = self.here(zeros | deltas)
        assert got.keys() >= {path for path, delta in want.items() if np.any(delta)}
        for path_, delta in got.items():
            np.testing.assert_allclose(delta, want[path_], rtol=1e-4, atol=1e-5, err_msg=path_)


_MODELS = {}


def model(name):
    if name not in _MODELS:
        _MODELS[name] = Model(name)
    return _MODELS[name]


RNG = np.random.default_rng(0)


def factor(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def write(path, tensors):
    return originals.write_safetensors(path, tensors)


def kohya(module):
    return f"lora_unet_{module.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"


def comfy(module):
    return f"diffusion_model.{module}", ".lora_A.weight", ".lora_B.weight"


def fal(module):
    return f"base_model.model.{module}", ".lora_A.weight", ".lora_B.weight"


def bare(module):
    return module, ".lora_A.weight", ".lora_B.weight"


def with_dots(module):
    return f"diffusion_model.{module}", ".lora_down.weight", ".lora_up.weight"


@pytest.mark.parametrize("spelled", [kohya, comfy, fal, bare, with_dots])
@pytest.mark.parametrize("name", NETWORKS)
def test_names_of_the_original_code(tmp_path, name, spelled):
    """Every linear layer, each with a rank and an alpha of its own."""
    network = model(name)
    tensors, deltas = {}, {}
    for i, module in enumerate(filter(few_blocks, network.modules)):
        rows, columns = network.original[f"{module}.weight"].shape
        rank = 1 + i % 3
        up, down = factor(rows, rank), factor(rank, columns)
        stem, down_end, up_end = spelled(module)
        tensors |= {stem + down_end: down, stem + up_end: up}
        scale = 1.0
        if i % 2:
            tensors[f"{stem}.alpha"], scale = np.array(0.5, np.float32), 0.5 / rank
        deltas[f"{module}.weight"] = scale * up @ down
    assert len(deltas) > 30
    network.check(write(tmp_path / "x.safetensors", tensors), deltas)


def peft(module):
    return f"transformer.{module}", ".lora_A.weight", ".lora_B.weight"


def one_trainer(module):
    return f"lora_transformer_{module.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"


def kohya_of_diffusers(module):
    return f"lora_unet_{module.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"


def old_diffusers(module):
    return f"transformer.{module}", ".lora.down.weight", ".lora.up.weight"


def lycoris(module):
    return f"lycoris_{module.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"


@pytest.mark.parametrize(
    "spelled", [peft, fal, bare, comfy, one_trainer, kohya_of_diffusers, old_diffusers, lycoris]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_names_of_diffusers(tmp_path, name, spelled):
    network = model(name)
    tensors, want = {}, {}
    for path, weight in network.weights.items():
        module, _, leaf = path.rpartition(".")
        if leaf == "kernel" and weight.ndim == 2 and ".1" not in module:
            down, up = factor(2, len(weight)), factor(weight.shape[1], 2)
            stem, down_end, up_end = spelled(module)
            tensors |= {stem + down_end: down, stem + up_end: up}
            want[path] = (up @ down).T
    got = network.changed_by(write(tmp_path / "x.safetensors", tensors))
    assert got.keys() == want.keys()
    for path, delta in got.items():
        np.testing.assert_allclose(delta, want[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_names_of_xlabs(tmp_path, prefix):
    """Attention processors: 1 is the image, 2 the text; of single blocks the first rows alone."""
    network, width = model("flux_dev"), original_keys.SMALL
    tensors, deltas = {}, {}

    def add(name, original, rows=None):
        height, columns = network.original[f"{original}.weight"].shape
        up, down = factor(rows or height, 2), factor(2, columns)
        tensors[f"{prefix}{name}.down.weight"], tensors[f"{prefix}{name}.up.weight"] = down, up
        deltas[f"{original}.weight"] = np.zeros((height, columns), np.float32)
        deltas[f"{original}.weight"][: rows or height] = up @ down

    for i in (0, 18):
        for number, stream in (("1", "img"), ("2", "txt")):
            processor = f"double_blocks.{i}.processor"
            add(f"{processor}.qkv_lora{number}", f"double_blocks.{i}.{stream}_attn.qkv")
            add(f"{processor}.proj_lora{number}", f"double_blocks.{i}.{stream}_attn.proj")
    add("single_blocks.37.processor.qkv_lora", "single_blocks.37.linear1", 3 * width)
    add("single_blocks.37.processor.proj_lora", "single_blocks.37.linear2")
    network.check(write(tmp_path / "x.safetensors", tensors), deltas)


def loha(weight):
    rows, columns = weight.shape
    a, b, c, d = factor(rows, 2), factor(2, columns), factor(rows, 2), factor(2, columns)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return dict(zip(names, (a, b, c, d), strict=True)), (a @ b) * (c @ d)


def lokr(weight):
    """The rows of the second factor do not divide those of a part."""
    rows, columns = weight.shape
    one, two = factor(2, 2), factor(rows // 2, columns // 2)
    return {"lokr_w1": one, "lokr_w2": two}, np.kron(one, two)


def dora(axis):
    def changed(weight):
        rows, columns = weight.shape
        up, down = factor(rows, 2), factor(2, columns)
        sizes = np.abs(factor(*((rows, 1) if axis == 0 else (1, columns)))) + 0.5
        moved = weight + up @ down
        norms = np.linalg.norm(moved, axis=1 - axis, keepdims=True)
        tensors = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": sizes}
        return tensors, sizes * moved / norms - weight

    return changed


def ia3(on_input):
    def changed(weight):
        values = factor(weight.shape[on_input])
        scaled = weight * (values[None] if on_input else values[:, None])
        return {"weight": values, "on_input": np.array([on_input], np.float32)}, scaled

    return changed


def oft(weight):
    """Blocks of two rows are rotated; none is between two parts."""
    blocks = 0.3 * factor(len(weight) // 2, 2, 2)
    q = blocks - blocks.swapaxes(-1, -2)
    one = np.eye(2)
    turned = [
        ((one + each) @ np.linalg.inv(one - each)).T @ rows
        for each, rows in zip(q, weight.reshape(-1, 2, weight.shape[1]), strict=True)
    ]
    return {"oft_blocks": blocks}, np.concatenate(turned) - weight


def difference(weight):
    values = factor(*weight.shape)
    return {"diff": values}, values


FORMATS = {
    "LoHa": loha,
    "LoKr": lokr,
    "DoRA by rows": dora(0),
    "DoRA by columns": dora(1),
    "(IA)^3": ia3(0),
    "(IA)^3 of inputs": ia3(1),
    "OFT": oft,
    "full": difference,
}


@pytest.mark.parametrize("made", FORMATS)
@pytest.mark.parametrize(
    ("name", "modules"),
    [
        (
            "flux_dev",
            [
                "double_blocks.0.img_attn.qkv",
                "single_blocks.1.linear1",
                "final_layer.adaLN_modulation.1",
            ],
        ),
        (
            "sd35_medium",
            [
                "joint_blocks.0.x_block.attn.qkv",
                "joint_blocks.3.context_block.attn.qkv",
                "joint_blocks.23.context_block.adaLN_modulation.1",
                "joint_blocks.22.context_block.adaLN_modulation.1",
            ],
        ),
    ],
)
def test_formats_on_tensors_that_are_one_in_the_original_code(tmp_path, made, name, modules):
    """The change of the whole, whose rows diffusers has in several or in another order."""
    network, tensors, deltas = model(name), {}, {}
    for module in modules:
        weight = network.original[f"{module}.weight"]
        own, deltas[f"{module}.weight"] = FORMATS[made](weight)
        stem = kohya(module)[0]
        tensors |= {f"{stem}.{role}": array for role, array in own.items()}
    network.check(write(tmp_path / "x.safetensors", tensors), deltas)


def test_biases_and_norms(tmp_path):
    """PEFT's bias of `lora_B`, kohya's differences."""
    network, qkv = model("flux_dev"), "double_blocks.0.img_attn.qkv"
    rows, columns = network.original[f"{qkv}.weight"].shape
    up, down, bias, norm = factor(rows, 2), factor(2, columns), factor(rows), factor(2)
    tensors = {
        f"base_model.model.{qkv}.lora_A.weight": down,
        f"base_model.model.{qkv}.lora_B.weight": up,
        f"base_model.model.{qkv}.lora_B.bias": bias,
        "lora_unet_single_blocks_0_linear1.diff_b": (other := factor(7 * original_keys.SMALL)),
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.w_norm": norm,
    }
    deltas = {
        f"{qkv}.weight": up @ down,
        f"{qkv}.bias": bias,
        "single_blocks.0.linear1.bias": other,
        "double_blocks.0.img_attn.norm.query_norm.scale": norm,
    }
    network.check(write(tmp_path / "x.safetensors", tensors), deltas)


def test_a_tensor_and_parts_of_it_add_up(tmp_path):
    """linear1 by kohya, its first rows by XLabs and one of diffusers' layers, in one file."""
    network, width = model("flux_dev"), original_keys.SMALL
    ups, downs = [factor(7 * width, 2), factor(3 * width, 2), factor(width, 2)], []
    downs = [factor(2, width) for _ in ups]
    tensors = {
        "single_transformer_blocks.0.attn.to_k.lora_A.weight": downs[2],
        "single_transformer_blocks.0.attn.to_k.lora_B.weight": ups[2],
        "single_blocks.0.processor.qkv_lora.down.weight": downs[1],
        "single_blocks.0.processor.qkv_lora.up.weight": ups[1],
        "lora_unet_single_blocks_0_linear1.lora_down.weight": downs[0],
        "lora_unet_single_blocks_0_linear1.lora_up.weight": ups[0],
    }
    total = ups[0] @ downs[0]
    total[: 3 * width] += ups[1] @ downs[1]
    total[width : 2 * width] += ups[2] @ downs[2]
    path = write(tmp_path / "x.safetensors", tensors)
    network.check(path, {"single_blocks.0.linear1.weight": total})


CLIP = {"text_model.encoder.layers.0.self_attn.q_proj.kernel": (4, 4)}
T5 = {"encoder.block.0.layer.0.SelfAttention.q.kernel": (4, 4)}
ENCODERS = {
    "flux": {"text_encoder": CLIP, "text_encoder_2": T5},
    "sd3": {"text_encoder": CLIP, "text_encoder_2": CLIP, "text_encoder_3": T5},
    "sd3 without CLIP": {"text_encoder_3": T5},
    "chroma": {"text_encoder": T5},
}
CLIP_LAYER = "text_model_encoder_layers_0_self_attn_q_proj"
T5_LAYER = "encoder_block_0_layer_0_SelfAttention_q"


@pytest.mark.parametrize(
    ("family", "stem", "component"),
    [
        ("flux", f"lora_te1_{CLIP_LAYER}", "text_encoder"),
        ("flux", f"lora_te_{CLIP_LAYER}", "text_encoder"),
        ("flux", f"lora_te3_{T5_LAYER}", "text_encoder_2"),
        ("flux", f"lora_te2_{T5_LAYER}", "text_encoder_2"),
        ("sd3", f"lora_te1_{CLIP_LAYER}", "text_encoder"),
        ("sd3", f"lora_te2_{CLIP_LAYER}", "text_encoder_2"),
        ("sd3", f"lora_te3_{T5_LAYER}", "text_encoder_3"),
        ("sd3 without CLIP", f"lora_te3_{T5_LAYER}", "text_encoder_3"),
        ("chroma", f"lora_te3_{T5_LAYER}", "text_encoder"),
        (
            "flux",
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
            "text_encoder_2",
        ),
        (
            "sd3",
            "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
            "text_encoder_3",
        ),
        (
            "sd3",
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj",
            "text_encoder_2",
        ),
    ],
)
def test_text_encoders_by_family(tmp_path, family, stem, component):
    up, down = factor(4, 2), factor(2, 4)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    changes = read_lora(write(tmp_path / "x.safetensors", tensors), ENCODERS[family])
    assert changes.keys() == {component}
    ((key, change),) = changes[component].items()
    (path,) = ENCODERS[family][component]
    assert key == path.replace(".kernel", ".weight")
    np.testing.assert_allclose(change.delta(np.zeros((4, 4))), up @ down, rtol=1e-6)


SD1 = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (
        np.zeros((2, 768), np.float32)
    )
}
FLUX_QKV = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": factor(2, 3072)}
SD3_QKV = {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": factor(2, 1536)}
WIDE = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": factor(2, 2432)}
CHROMA = {"lora_unet_distilled_guidance_layer_in_proj.lora_down.weight": factor(2, 64)}
QWEN = {"transformer.transformer_blocks.0.img_mod.1.lora_A.weight": factor(2, 3072)}
# The names of nobody, though they end as those of FLUX.1 do.
STRANGE = {"dit.transformer_blocks.0.attn.to_q.lora_A.weight": factor(2, 3072)}
CONTROL = {
    "double_blocks.0.img_attn.qkv.lora_A.weight": factor(2, 4),
    "double_blocks.0.img_attn.norm.query_norm.scale": factor(2),
}


@pytest.mark.parametrize(
    ("tensors", "name", "family", "message"),
    [
        (SD1, "flux_dev", "FLUX.1", "a LoRA for Stable Diffusion 1, expected one for FLUX.1"),
        (SD3_QKV, "flux_dev", "FLUX.1", "a LoRA for Stable Diffusion 3, expected one for FLUX.1"),
        (FLUX_QKV, "sd35_medium", "Stable Diffusion 3.5", "for FLUX.1, expected one for Stable"),
        (
            {**WIDE, "transformer.transformer_blocks.0.attn2.to_q.lora_A.weight": factor(2, 4)},
            "flux_dev",
            "FLUX.1 schnell",
            "for Stable Diffusion 3, expected one for FLUX.1 schnell",
        ),
        (CHROMA, "flux_dev", "FLUX.1", "a LoRA for Chroma, expected one for FLUX.1"),
        (
            STRANGE,
            "flux_dev",
            "FLUX.1",
            r"such as dit\.transformer.*, expected those of a LoRA for F",
        ),
        (QWEN, "flux_dev", "FLUX.1", "tensors for Qwen-Image, which is not supported, expected a"),
        (CONTROL, "flux_dev", "FLUX.1", "query_norm.scale: got a control LoRA of FLUX.1"),
        ({"lora_unet_double_blocks_99_img_mlp_0.alpha": factor()}, "flux_dev", "FLUX.1", "nothing"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, tensors, name, family, message):
    path = write(tmp_path / "x.safetensors", tensors)
    shapes = {"transformer": model(name).shapes}
    with pytest.raises(InputError, match=message):
        read_lora(path, shapes, family)


@pytest.mark.parametrize("tensors", [FLUX_QKV, SD3_QKV, WIDE])
def test_a_unet_takes_none_of_a_transformer(tmp_path, tensors):
    path = write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(InputError, match=r"for (FLUX|Stable Diffusion 3).*, expected one for Stab"):
        read_lora(path, {"unet": {"conv_in.kernel": (3, 3, 4, 4)}})


@pytest.mark.parametrize("name", [*NETWORKS, "sd35_large"])
def test_every_kohya_name_of_a_published_transformer_is_taken_apart(name):
    table = original_keys.oracle(name)
    for side in ("original", "diffusers"):
        for key, shape in table[side].items():
            if key.endswith(".weight") and len(shape) > 1:
                module = key.removesuffix(".weight")
                found = parse(f"{kohya(module)[0]}.lora_down.weight")
                assert found.component == "transformer", module
                assert unflatten_key(found.module) == module


@pytest.mark.parametrize("spelled", [kohya, comfy, bare])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_file_has_the_names_of_diffusers(tmp_path, name, spelled):
    """Also where not all blocks are changed, and not the last one."""
    network = model(name)
    tensors = {}
    for i, module in enumerate(network.modules):
        if not few_blocks(module) or module.startswith(("joint_blocks.23.", "double_blocks.18.")):
            continue
        rows, columns = network.original[f"{module}.weight"].shape
        stem, down_end, up_end = spelled(module)
        tensors |= {stem + down_end: factor(2, columns), stem + up_end: factor(rows, 2)}
        tensors[f"{stem}.alpha"] = np.array(1 + i % 3, np.float32)
    source = write(tmp_path / "a.safetensors", tensors)
    target = tmp_path / "b.safetensors"
    assert main.run("convert", [str(source), str(target)]) == 0
    assert {key.split(".")[0] for key in read_table(target)} == {"transformer"}
    assert {parse(key).spelling for key in read_table(target)} == {"PEFT"}
    before, after = network.changed_by(source), network.changed_by(target)
    assert before.keys() == after.keys()
    for path, delta in before.items():
        np.testing.assert_allclose(after[path], delta, rtol=1e-5, atol=1e-6, err_msg=path)


def test_the_last_block_of_a_converted_file(tmp_path):
    """Its two vectors for the text are the other way, which its rows tell."""
    network = model("sd35_medium")
    module = "joint_blocks.23.context_block.adaLN_modulation.1"
    rows, columns = network.original[f"{module}.weight"].shape
    stem, down_end, up_end = kohya(module)
    up, down = factor(rows, 2), factor(2, columns)
    source = write(tmp_path / "a.safetensors", {stem + down_end: down, stem + up_end: up})
    target = tmp_path / "b.safetensors"
    assert main.run("convert", [str(source), str(target)]) == 0
    network.check(target, {f"{module}.weight": up @ down})


def test_a_converted_file_of_xlabs(tmp_path):
    width = original_keys.SMALL
    processor = "single_blocks.37.processor.qkv_lora"
    up, down = factor(3 * width, 2), factor(2, width)
    tensors = {f"{processor}.down.weight": down, f"{processor}.up.weight": up}
    source, target = write(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    assert main.run("convert", [str(source), str(target)]) == 0
    delta = np.zeros((7 * width, width), np.float32)
    delta[: 3 * width] = up @ down
    model("flux_dev").check(target, {"single_blocks.37.linear1.weight": delta})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {
                f"lora_te3_{T5_LAYER}.lora_down.weight": factor(2, 4),
                f"lora_te3_{T5_LAYER}.lora_up.weight": factor(4, 2),
            },
            "a LoRA of T5, which a LoRA file of diffusers cannot hold",
        ),
        (
            {
                "lora_unet_double_blocks_0_img_attn_lin.lora_down.weight": factor(2, 4),
                "lora_unet_double_blocks_0_img_attn_lin.lora_up.weight": factor(4, 2),
            },
            "names of no LoRA for a published network",
        ),
        (
            {
                "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": factor(2, 4),
                "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": factor(4, 2),
                "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": factor(2, 4),
                "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight": factor(4, 2),
            },
            "factors of modules that have others",
        ),
    ],
)
def test_what_cannot_be_converted_is_a_sentence(tmp_path, capsys, tensors, message):
    source = write(tmp_path / "a.safetensors", tensors)
    assert main.run("convert", [str(source), str(tmp_path / "b.safetensors")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_of_kohya_comes_back_as_it_was(tmp_path, name):
    """To the names of diffusers and back: the same tensors to the last bit."""
    network, tensors = model(name), {}
    for i, module in enumerate(filter(few_blocks, network.modules)):
        rows, columns = network.original[f"{module}.weight"].shape
        stem, down_end, up_end = kohya(module)
        tensors |= {stem + down_end: factor(2, columns), stem + up_end: factor(rows, 2)}
        tensors[f"{stem}.alpha"] = np.array(1 + i % 3, np.float32)
    if name.startswith("sd3"):  # so narrow that nothing else tells
        tensors |= {f"{kohya('x_embedder.proj')[0]}{end}": array for end, array in CONV.items()}
    first, second, third = (tmp_path / f"{x}.safetensors" for x in "abc")
    write(first, tensors)
    assert main.run("convert", [str(first), str(second)]) == 0
    assert main.run("convert", [str(second), str(third), "--format", "kohya"]) == 0
    table = read_table(third)
    assert table.keys() - tensors.keys() <= {f"{kohya('x_embedder.proj')[0]}.alpha"}
    for key, array in tensors.items():
        np.testing.assert_array_equal(read_tensor(table[key]), array, err_msg=key)


CONV = {
    ".lora_down.weight": factor(2, 2, 2, 2),
    ".lora_up.weight": factor(original_keys.SMALL, 2, 1, 1),
}


def test_parts_of_their_own_become_one_of_kohya(tmp_path):
    """Each with its own factors, rank and scale, and one of them without any."""
    network, width = model("flux_dev"), original_keys.SMALL
    tensors, single = {}, "single_transformer_blocks.1"
    delta = np.zeros((7 * width, width), np.float32)
    for i, (part, begin, rows) in enumerate(
        (("attn.to_q", 0, 1), ("attn.to_v", 2, 1), ("proj_mlp", 3, 4))
    ):
        up, down = factor(rows * width, 1 + i), factor(1 + i, width)
        stem = f"transformer.{single}.{part}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        tensors[f"{stem}.alpha"] = np.array(2.0, np.float32)
        delta[begin * width : (begin + rows) * width] = 2.0 / (1 + i) * up @ down
    source, target = write(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    assert main.run("convert", [str(source), str(target), "--format", "kohya"]) == 0
    stem = "lora_unet_single_blocks_1_linear1"
    table = read_table(target)
    assert set(table) == {
        f"{stem}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert table[f"{stem}.lora_down.weight"].shape == (1 + 2 + 3, width)
    network.check(target, {"single_blocks.1.linear1.weight": delta})


def test_text_encoders_in_kohyas_names(tmp_path):
    tensors = {}
    layers = {
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": f"lora_te1_{CLIP_LAYER}",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": f"lora_te2_{CLIP_LAYER}",
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q": f"lora_te3_{T5_LAYER}",
    }
    for layer in layers:
        tensors |= {f"{layer}.lora_A.weight": factor(2, 4), f"{layer}.lora_B.weight": factor(4, 2)}
    source, target = write(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    assert main.run("convert", [str(source), str(target), "--format", "kohya"]) == 0
    assert {name.partition(".")[0] for name in read_table(target)} == set(layers.values())


def test_kohyas_names_of_a_unet_are_not_written(tmp_path, capsys):
    pair = {"unet.conv_in.lora_A.weight": factor(2, 4), "unet.conv_in.lora_B.weight": factor(4, 2)}
    source, target = write(tmp_path / "a.safetensors", pair), tmp_path / "b.safetensors"
    assert main.run("convert", [str(source), str(target), "--format", "kohya"]) == 2
    assert "format: got kohya for a LoRA of a UNet, expected diffusers" in capsys.readouterr().err
    assert not target.exists()
    assert main.run("convert", [str(source), str(target), "--format", "flax"]) == 2
    assert "format: got 'flax', expected" in capsys.readouterr().err
