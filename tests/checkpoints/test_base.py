"""Files that lack components, and the folder that has them."""

import dataclasses
import json

import numpy as np
import originals
import pytest
import tiny
from flax import nnx
from original_keys import converted, oracle, small_arrays

import jaxdiff
from jaxdiff.checkpoints import file_kinds
from jaxdiff.checkpoints.clip_vocabulary import clip_tokenizer
from jaxdiff.checkpoints.description import describe
from jaxdiff.checkpoints.key_mapping import torch_key_to_path
from jaxdiff.checkpoints.loading import lazy_tensors
from jaxdiff.checkpoints.model_registry import MODEL_CLASSES, ModelClass
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.pipelines import PipelineComponents, write_pipeline
from jaxdiff.checkpoints.safetensors import read_table, read_tensor
from jaxdiff.checkpoints.single_file import write_single_file
from jaxdiff.checkpoints.single_file_layouts import UNET
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import unflatten
from jaxdiff.models.build import param_dict
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory

GIVE = r"expected a complete checkpoint, or a model with the rest \(--base FOLDER, base=...\)"


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """A whole file of Stable Diffusion 1, one with its UNet alone, and a folder with the rest."""
    folder = tmp_path_factory.mktemp("sd1")
    tensors = originals.original_tensors("sd1", originals.components("sd1"))
    whole = originals.write_safetensors(folder / "whole.safetensors", tensors)
    unet = {name: values for name, values in tensors.items() if name.startswith(UNET)}
    alone = originals.write_safetensors(folder / "alone.safetensors", unet)
    write_pipeline(folder / "base", read_model(whole))
    return whole, alone, folder / "base"


def test_a_base_gives_what_a_file_lacks(sd1, tmp_path):
    whole, alone, base = sd1
    with pytest.raises(InputError, match=f"alone.safetensors: got no vae, text_encoder, {GIVE}"):
        read_model(alone)
    assert describe(alone).missing == ("vae", "text_encoder")
    expected, got = jaxdiff.load(whole), jaxdiff.load(alone, base=base)
    assert got.fingerprint == expected.fingerprint
    again = tmp_path / "again.safetensors"
    assert main.run("convert", [str(alone), str(again), "--base", str(base)]) == 0
    stored, wanted = written(again), written(whole)
    assert stored.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(stored[name], values, err_msg=name)
    shapes = read_model(alone, base=base, only=())
    for name, component in shapes.components.items():
        wanted = param_dict(expected.parts.components[name].module)
        assert {k: v.shape for k, v in param_dict(component.module).items()} == {
            k: v.shape for k, v in wanted.items()
        }


def test_a_vae_of_its_own_comes_before_that_of_the_base(sd1, tmp_path):
    _, alone, base = sd1
    other = tiny.random_component(AutoencoderKL, _VAE, seed=9)
    parts = read_model(base)
    write_pipeline(
        tmp_path / "other",
        dataclasses.replace(parts, components={**parts.components, "vae": other}),
    )
    got = read_model(alone, base=base, vae=tmp_path / "other")
    ours = param_dict(got.components["vae"].module)
    for key, values in param_dict(other.module).items():
        np.testing.assert_array_equal(ours[key], values)


_VAE = AutoencoderKLConfig(
    block_out_channels=(32,) * 4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)


def test_what_is_no_base(sd1, tmp_path):
    whole, alone, base = sd1
    with pytest.raises(InputError, match=r"base: got .* for .*base, expected a single file"):
        read_model(base, base=base)
    with pytest.raises(InputError, match=r"base: got the file .*, expected a diffusers folder"):
        read_model(alone, base=whole)
    with pytest.raises(InputError, match=r"base: got nowhere \(no such file or folder\)"):
        read_model(alone, base="nowhere")
    with pytest.raises(InputError, match=r"got no model_index\.json"):
        read_model(alone, base=tmp_path)
    folder = tmp_path / "without"
    write_pipeline(folder, read_model(whole))
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="without a CLIPTextModel, expected one for text_encoder"):
        read_model(alone, base=folder)


def test_generate_and_the_settings_of_its_images(sd1, tmp_path, capsys):
    _, alone, base = sd1
    output = tmp_path / "out"
    size = ("--height", "64", "--width", "64", "--steps", "1", "--output", str(output))
    both = ("--model", str(alone), "--base", str(base))
    assert main.run("generate", ["a star", *both, *size]) == 0
    (path,) = output.glob("*.png")
    assert main.run("generate", ["--from", str(path), *both, "--output", str(tmp_path / "b")]) == 0
    assert [p.read_bytes() for p in (tmp_path / "b").glob("*.png")] == [path.read_bytes()]
    capsys.readouterr()
    again = ["--from", str(path), "--model", str(alone), "--output", str(tmp_path / "c")]
    assert main.run("generate", again) == 2
    assert "(--base FOLDER, base=...)" in capsys.readouterr().err
    base.rename(base.with_name("moved"))
    try:
        moved = [*again, "--base", str(base.with_name("moved"))]
        assert main.run("generate", moved) == 0
    finally:
        base.with_name("moved").rename(base)


class StandIn(nnx.Module):
    """A network that has the weights of another one, and computes nothing."""

    def __init__(self, config, shapes, *, param_dtype=np.float32, rngs=None, **options):
        del options
        layers = LayerFactory(rngs=rngs, param_dtype=param_dtype)
        self.config, table = config, {}
        for name, shape in shapes.items():
            path = torch_key_to_path(name, len(shape))
            axes = {2: (1, 0), 4: (2, 3, 1, 0)} if path.endswith(".kernel") else {}
            own = tuple(shape[axis] for axis in axes.get(len(shape), range(len(shape))))
            table[path] = layers.param(ZEROS, own)
        for name, value in unflatten(table).items():
            setattr(self, name, _module(value))


def _module(value):
    if not isinstance(value, dict):
        return value
    inner = {str(name): _module(each) for name, each in value.items()}
    if all(name.isdigit() for name in inner):
        last = max(map(int, inner))
        return nnx.List([inner.get(str(i), nnx.Module()) for i in range(last + 1)])
    module = nnx.Module()
    for name, each in inner.items():
        setattr(module, name, each)
    return module


class Transformer(StandIn):
    """In place of a transformer."""


class T5(StandIn):
    """In place of T5."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """A config that is what config.json says."""

    values: dict

    def __getattr__(self, name):
        if name == "values" or name not in self.values:
            raise AttributeError(name)
        return self.values[name]


def stand_in(monkeypatch, name, module, shapes):
    """Register a network of these shapes, by PyTorch's names, as a class of diffusers."""

    def configs(raw, *, source):
        del source
        return Fields(dict(raw)), shapes

    kind = ModelClass(name=name, module=module, configs=configs)
    monkeypatch.setitem(MODEL_CLASSES, name, kind)


CLIP = CLIPTextConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=64,
    projection_dim=64,
    num_hidden_layers=1,
    num_attention_heads=1,
    bos_token_id=0,
    eos_token_id=2,
)
T5_SHAPES = {
    "shared.weight": (20, 4),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (8, 2),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (6, 4),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (10, 4),
}
SCHEDULE = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}


@pytest.fixture
def flux(monkeypatch, tmp_path):
    """A folder of FLUX.1 with stand-ins, the arrays of its transformer, and those of T5."""
    for beginning in ("double_blocks.0.img_attn.", "single_transformer_blocks.0."):
        monkeypatch.delitem(file_kinds.OTHER_FAMILIES, beginning, raising=False)
    published = oracle("flux_dev")
    arrays = small_arrays(published)
    ours = converted(published, arrays)
    shapes = {name: values.shape for name, values in ours.items()}
    stand_in(monkeypatch, "FluxTransformer2DModel", Transformer, shapes)
    stand_in(monkeypatch, "T5EncoderModel", T5, T5_SHAPES)
    vae = dataclasses.replace(_VAE, latent_channels=16, block_out_channels=(32,) * 4)
    parts = PipelineComponents(
        components={
            "vae": tiny.random_component(AutoencoderKL, vae),
            "text_encoder": tiny.random_component(CLIPTextModel, CLIP),
        },
        scheduler=SCHEDULE,
        tokenizers={name: clip_tokenizer("!") for name in ("tokenizer", "tokenizer_2")},
        class_name="FluxPipeline",
    )
    base = tmp_path / "base"
    write_pipeline(base, parts)
    rng = np.random.default_rng(2)
    t5 = {n: rng.normal(size=shape).astype(np.float32) for n, shape in T5_SHAPES.items()}
    index = json.loads((base / "model_index.json").read_text())
    index["text_encoder_2"] = ["transformers", "T5EncoderModel"]
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (base / "model_index.json").write_text(json.dumps(index))
    for name in ("text_encoder_2", "transformer"):
        (base / name).mkdir()
        (base / name / "config.json").write_text("{}")
    originals.write_safetensors(base / "text_encoder_2" / "model.safetensors", t5)
    return base, arrays, ours, t5


def written(path):
    return {name: read_tensor(entry) for name, entry in read_table(path).items()}


@pytest.mark.parametrize("prefix", ["", UNET])
def test_a_transformer_alone_with_a_base(flux, tmp_path, prefix):
    base, arrays, ours, t5 = flux
    named = {prefix + name: values for name, values in arrays.items()}
    alone = originals.write_safetensors(tmp_path / "alone.safetensors", named)
    with pytest.raises(InputError, match=f"got no vae, text_encoder, text_encoder_2, {GIVE}"):
        read_model(alone)
    found = describe(alone)
    assert (found.family, found.prediction_type) == ("FLUX.1 dev", "flow_prediction")
    assert found.missing == ("vae", "text_encoder", "text_encoder_2")
    parts = read_model(alone, base=base)
    assert parts.class_name == "FluxPipeline"
    assert parts.scheduler["shift"] == 7.0  # which no file has
    assert parts.tokenizers.keys() == {"tokenizer", "tokenizer_2"}
    assert parts.components.keys() == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    for name, values in (("transformer", ours), ("text_encoder_2", t5)):
        got = lazy_tensors(parts.components[name].module)
        assert got.keys() == values.keys()
        for key, array in values.items():
            np.testing.assert_array_equal(got[key].fetch(), array, err_msg=key)
    config = parts.components["transformer"].module.config
    assert (config.guidance_embeds, config.num_layers, config.in_channels) == (True, 19, 2)


def test_a_whole_file_needs_a_base_for_the_tokenizer_of_t5(flux, tmp_path):
    base, arrays, _, t5 = flux
    named = {UNET + name: values for name, values in arrays.items()}
    alone = originals.write_safetensors(tmp_path / "alone.safetensors", named)
    whole = tmp_path / "whole.safetensors"
    with pytest.warns(UserWarning, match="shift: got 7.0, expected 3.0: a single file does not"):
        write_single_file(whole, read_model(alone, base=base))
    stored = written(whole)
    for name, values in named.items():
        np.testing.assert_array_equal(stored[name], values, err_msg=name)
    for name, values in t5.items():
        np.testing.assert_array_equal(stored[f"text_encoders.t5xxl.transformer.{name}"], values)
    with pytest.raises(InputError, match="got no tokenizer_2, which no single file has, expected"):
        read_model(whole)
    again = read_model(whole, base=base)
    assert again.scheduler["shift"] == 7.0
    write_single_file(
        tmp_path / "again.safetensors", dataclasses.replace(again, scheduler=SCHEDULE)
    )
    assert (tmp_path / "again.safetensors").read_bytes() == whole.read_bytes()


def test_the_schedule_of_another_network_does_not_count(flux, tmp_path):
    base, arrays, _, _ = flux
    (base / "transformer" / "config.json").write_text(json.dumps({"guidance_embeds": False}))
    alone = originals.write_safetensors(tmp_path / "alone.safetensors", arrays)
    assert read_model(alone, base=base, only=()).scheduler["shift"] == 3.0


def test_a_base_of_a_model_with_the_same_tensors_names_it(flux, tmp_path):
    base, arrays, _, _ = flux
    index = json.loads((base / "model_index.json").read_text())
    index["_class_name"] = "FluxKontextPipeline"
    (base / "model_index.json").write_text(json.dumps(index))
    alone = originals.write_safetensors(tmp_path / "alone.safetensors", arrays)
    assert read_model(alone, base=base, only=()).class_name == "FluxKontextPipeline"
