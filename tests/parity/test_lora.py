"""LoRAs that PEFT and diffusers write, in every spelling: the pictures of both are the same."""

import dataclasses
import re

import cascade_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import image, nchw, randomise
from diffusers import UNet2DConditionModel
from families import IMAGE_CLASSES, INPAINT_CLASSES, as_class, pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import first_devices

import jaxdiff
from jaxdiff.checkpoints.components import read_component
from jaxdiff.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

PROMPT = "abc de"
STEPS = 3
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "conv1"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def adapted(module, targets, seed, **options):
    """`module` with random factors of rank 3 and alpha 6, and these factors."""
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options
    )
    module.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return get_peft_model_state_dict(module)


class Case:
    """A family in both programs, and a LoRA for it as diffusers writes it."""

    def __init__(self, family, folder):
        self.base = folder / family
        pipe = pipeline(family)
        pipe.save_pretrained(self.base)
        self.cls = type(pipe)
        layers = {"unet_lora_layers": adapted(pipe.unet, TARGETS, 1)}
        layers["text_encoder_lora_layers"] = adapted(pipe.text_encoder, TEXT_TARGETS, 2)
        if family == "sdxl":
            layers["text_encoder_2_lora_layers"] = adapted(pipe.text_encoder_2, TEXT_TARGETS, 3)
        # diffusers' file has no alpha where nobody passes its metadata on.
        self.cls.save_lora_weights(folder / "lora", **layers)
        self.file = folder / "lora" / "pytorch_lora_weights.safetensors"
        self.ours = first_devices(jaxdiff.load(self.base, dtype="float32"), 1)

    def theirs(self, *loras, scales=(1.0,), cls=None, steps=STEPS, **options):
        """The latents of diffusers with these files, drawn by the pipeline `cls`."""
        pipe = self.cls.from_pretrained(self.base)
        pipe.set_progress_bar_config(disable=True)
        for i, path in enumerate(loras):
            pipe.load_lora_weights(path, adapter_name=str(i))
        if loras:
            pipe.set_adapters([str(i) for i in range(len(loras))], list(scales))
        if cls is None:
            options["latents"] = nchw(NOISE)
        else:
            pipe = as_class(pipe, cls)
        way = {"num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "latent"}
        out = pipe(PROMPT, **way, **options).images
        return out.detach().numpy().transpose(0, 2, 3, 1)

    def draw(self, steps=STEPS, **options):
        way = {"steps": steps, "guidance_scale": 2.0, "output": "latent"}
        return self.ours(PROMPT, latents=NOISE, **way, **options).images


NOISE = image((1, 8, 8, 4), seed=5)


_CASES = {}


@pytest.fixture(params=["sd1", "sdxl"])
def case(request, tmp_path_factory):
    """A family, without LoRAs before and after."""
    family = request.param
    if family not in _CASES:
        _CASES[family] = Case(family, tmp_path_factory.mktemp("lora"))
    yield _CASES[family]
    _CASES[family].ours.unload_loras()


def near(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def test_a_file_of_diffusers(case):
    before = case.draw()
    case.ours.load_lora(case.file)
    want = case.theirs(case.file)
    assert near(case.draw(), want) < 1e-4
    assert near(before, want) > 1e-2


ADDED = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]


@pytest.mark.parametrize("spelling", ["diffusers", "peft", "kohya", "processors"])
def test_added_keys_and_values(added_case, tmp_path, spelling):
    """Attention of DeepFloyd IF's and Kandinsky's UNets, which has keys and values of the text."""
    theirs, tensors, ours = added_case
    assert {name.split(".")[-3] for name in tensors} >= {"add_k_proj", "add_v_proj"}
    file = tmp_path / "x.safetensors"
    named = {f"unet.{name}": tensor for name, tensor in tensors.items()}
    if spelling == "peft":
        named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    elif spelling == "kohya":
        named = kohya(named, 3.0)
    elif spelling == "processors":
        named = {processor(name): tensor for name, tensor in tensors.items()}
    save_file(named, file)
    x, context = image((1, 8, 8, 3), seed=6), image((1, 5, cascade_files.STATES), seed=7)
    inputs = nchw(x), torch.tensor([9]), torch.from_numpy(context)
    with torch.no_grad():
        theirs.enable_adapters()
        want = theirs(*inputs).sample.numpy().transpose(0, 2, 3, 1)
        theirs.disable_adapters()
        before = theirs(*inputs).sample.numpy().transpose(0, 2, 3, 1)
    arguments = jnp.asarray(x), jnp.asarray([9]), jnp.asarray(context)
    assert near(np.asarray(ours.unet(*arguments)), before) < 1e-4
    ours.load_lora(file, 2.0)  # alpha / r of `adapted`, which the file does not have
    got = np.asarray(ours.unet(*arguments))
    ours.unload_loras()
    assert near(got, want) < 1e-4
    assert near(before, want) > 1e-2


def processor(name):
    """The name that diffusers before PEFT has for a tensor of an attention layer."""
    module, factor, _ = name.rsplit(".", 2)
    layer, role = module.removesuffix(".0"), {"lora_A": "down", "lora_B": "up"}[factor]
    path, _, projection = layer.rpartition(".")
    return f"{path}.processor.{projection}_lora.{role}.weight"


@pytest.fixture(scope="module")
def added_case(tmp_path_factory):
    """The UNet of a tiny DeepFloyd IF with a LoRA, its factors, and the model here."""
    folder = tmp_path_factory.mktemp("if")
    ours = cascade_files.first(folder / "tiny")
    fields = {name: getattr(cascade_files.FIRST, name) for name in IF_FIELDS}
    unet = randomise(UNet2DConditionModel(**fields), 1)
    unet.save_pretrained(folder / "unet")
    parts = {**ours.components, "unet": read_component(folder / "unet")}
    own = dataclasses.replace(ours, components=parts)
    pipe = jaxdiff.Pipeline(own, name="if", devices=jax.devices()[:1])
    return unet, adapted(unet, ADDED, 1), pipe


IF_FIELDS = (
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "norm_num_groups"),
    *("down_block_types", "mid_block_type", "up_block_types", "cross_attention_dim"),
    *("attention_head_dim", "layers_per_block", "encoder_hid_dim", "encoder_hid_dim_type"),
)


@pytest.mark.parametrize("case", ["sd1"], indirect=True)
def test_dora(case, tmp_path):
    unet = case.cls.from_pretrained(case.base).unet
    layers = adapted(unet, [t for t in TARGETS if t != "conv1"], 1, use_dora=True)
    case.cls.save_lora_weights(tmp_path, unet_lora_layers=layers)
    file = tmp_path / case.file.name
    assert any("lora_magnitude_vector" in name for name in load_file(file))
    before = case.draw()
    case.ours.load_lora(file)
    want = case.theirs(file)
    assert near(case.draw(), want) < 1e-4
    assert near(before, want) > 1e-2


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize(
    ("case", "cls", "masked"),
    [
        ("sd1", IMAGE_CLASSES["sd1"], False),
        ("sdxl", IMAGE_CLASSES["sdxl"], False),
        ("sd1", INPAINT_CLASSES["sd1"], True),
        ("inpaint", INPAINT_CLASSES["inpaint"], True),
    ],
    indirect=["case"],
    ids=["sd1-image", "sdxl-image", "sd1-mask", "nine-channels-mask"],
)
def test_images_are_given(case, picture, mask, cls, masked):
    """Image to image, and inpainting by putting the rest back and by a network that is told."""
    shared = {"steps": 20, "image": picture, "strength": 0.8}
    ours, theirs = dict(shared), dict(shared)
    if masked:
        ours["mask"] = mask
        theirs |= {"mask_image": mask, "height": 16, "width": 16}
    before = case.draw(**ours)
    case.ours.load_lora(case.file, 0.7)
    want = case.theirs(case.file, scales=(0.7,), cls=cls, **theirs)
    assert near(case.draw(**ours), want) < 1e-4
    assert near(before, want) > 1e-2


def test_two_at_once_with_weights(case, tmp_path):
    other = {name: tensor.flip(0) for name, tensor in load_file(case.file).items()}
    save_file(other, tmp_path / "other.safetensors")
    case.ours.load_lora(case.file, 0.7)
    case.ours.load_lora(tmp_path / "other.safetensors", -0.4)
    want = case.theirs(case.file, tmp_path / "other.safetensors", scales=(0.7, -0.4))
    assert near(case.draw(), want) < 1e-4


def kohya(tensors, alpha):
    """The same factors in kohya's spelling, with alpha."""
    prefixes = {"unet": "lora_unet_"}
    two = any(name.startswith("text_encoder_2.") for name in tensors)
    prefixes |= {"text_encoder": "lora_te1_" if two else "lora_te_", "text_encoder_2": "lora_te2_"}
    found = {}
    for name, tensor in tensors.items():
        component, _, rest = name.partition(".")
        module, factor = rest.removesuffix(".weight").rsplit(".", 1)
        if component != "unet" and not module.startswith("text_model."):
            module = f"text_model.{module}"
        stem = prefixes[component] + module.replace(".", "_")
        role = {"lora_A": "down", "lora_B": "up"}[factor]
        found[f"{stem}.lora_{role}.weight"] = tensor
        found[f"{stem}.alpha"] = torch.tensor(alpha)
    return found


def test_kohya(case, tmp_path):
    save_file(kohya(load_file(case.file), 1.5), tmp_path / "k.safetensors")
    case.ours.load_lora(tmp_path / "k.safetensors")
    got = case.draw()
    case.ours.set_loras({})
    # alpha / r = 0.5: half as strong as the same factors without alpha
    case.ours.load_lora(case.file, 0.5)
    assert near(got, case.draw()) < 1e-6
    assert near(got, case.theirs(case.file, scales=(0.5,))) < 1e-4


def test_spellings_of_older_diffusers(case, tmp_path):
    def older(name):
        name = name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        if name.startswith("text_encoder"):
            return name.replace(".lora.", ".lora_linear_layer.")
        return name

    save_file(
        {older(name): tensor for name, tensor in load_file(case.file).items()},
        tmp_path / "old.safetensors",
    )
    case.ours.load_lora(tmp_path / "old.safetensors")
    assert near(case.draw(), case.theirs(case.file)) < 1e-4


def attention_processors(tensors):
    """The UNet's attention in the oldest spelling of diffusers, and the same in PEFT's."""
    old, new = {}, {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"unet\.(.+\.attn[12])\.(to_\w+?)(\.0)?\.lora_([AB])\.weight", name)
        if found:
            role = {"A": "down", "B": "up"}[found[4]]
            old[f"{found[1]}.processor.{found[2]}_lora.{role}.weight"] = tensor
            new[name] = tensor
    return old, new


def test_attention_processors(case, tmp_path):
    """Written without a prefix at first, which diffusers no longer reads, then with one."""
    old, new = attention_processors(load_file(case.file))
    save_file(old, tmp_path / "first.safetensors")
    save_file(
        {f"unet.{name}": tensor for name, tensor in old.items()}, tmp_path / "old.safetensors"
    )
    save_file(new, tmp_path / "new.safetensors")
    want = case.theirs(tmp_path / "old.safetensors")
    assert near(case.theirs(tmp_path / "new.safetensors"), want) < 1e-6
    before = case.draw()
    for name in ("first", "old"):
        case.ours.load_lora(tmp_path / f"{name}.safetensors")
        assert near(case.draw(), want) < 1e-4
        case.ours.unload_loras()
    assert near(before, want) > 1e-2


def uneven(tensors):
    """kohya's file with another alpha for each module, and with another rank for some."""
    found = dict(tensors)
    for i, name in enumerate(name for name in tensors if name.endswith(".alpha")):
        stem = name.removesuffix(".alpha")
        found[name] = torch.tensor(0.5 + i % 4)
        if i % 3 == 0:
            down, up = (f"{stem}.lora_{role}.weight" for role in ("down", "up"))
            found[down], found[up] = tensors[down][:2].clone(), tensors[up][:, :2].clone()
    return found


@pytest.mark.parametrize(
    "written",
    [lambda tensors: uneven(kohya(tensors, 1.0)), lambda tensors: attention_processors(tensors)[0]],
    ids=["kohya", "processors"],
)
def test_a_converted_file(case, tmp_path, written):
    """`jaxdiff convert` writes what diffusers reads, to the same effect."""
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(written(load_file(case.file)), source)
    assert main.run("convert", [str(source), str(target)]) == 0
    before = case.draw()
    case.ours.load_lora(source)
    got = case.draw()
    case.ours.unload_loras()
    case.ours.load_lora(target)
    assert near(case.draw(), got) < 1e-6
    want = case.theirs(target)
    assert near(got, want) < 1e-4
    assert near(before, want) > 1e-2


@pytest.mark.parametrize("case", ["sd1"], indirect=True)
def test_a_converted_file_in_place_of_the_original(case, tmp_path):
    """In diffusers alone; it reads one alpha for all of kohya's modules, and SDXL by its depths."""
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(kohya(load_file(case.file), 1.5), source)
    assert main.run("convert", [str(source), str(target)]) == 0
    want = case.theirs(source)
    assert near(case.theirs(target), want) < 1e-6
    assert near(case.theirs(), want) > 1e-2
