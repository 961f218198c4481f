"""LoRAs of SD3, FLUX.1 and Chroma against diffusers: applied, exported, written and read again."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import test_flux_pipelines
import test_sd3_pipelines
import torch
from copier import image, nchw
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import first_devices

import jaxdiff
from jaxdiff.cli import main
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.experiments.training_methods import LORA, make_training_method
from jaxdiff.training.config import DiffusionObjective, LoRA

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

PROMPT = "abc de"
NOISE = image((1, 8, 8, 16), seed=5)
MODELS = {
    "sd35": (test_sd3_pipelines, "sd35-without-t5"),
    "flux": (test_flux_pipelines, "dev"),
    "chroma": (test_flux_pipelines, "chroma"),
}
TARGETS = {
    "sd35": ["to_q", "add_k_proj", "to_out.0", "to_add_out", "ff.net.0.proj", "norm1.linear"],
    "flux": [
        "to_q",
        "add_k_proj",
        "to_add_out",
        "proj_mlp",
        "proj_out",
        "norm.linear",
        "x_embedder",
    ],
    "chroma": ["to_q", "add_k_proj", "to_add_out", "proj_mlp", "proj_out", "in_proj"],
}
TEXT_TARGETS = ["q_proj", "fc1"]


def adapted(module, targets, seed):
    """`module` with random factors of rank 3 and alpha 6, and these factors."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    module.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return get_peft_model_state_dict(module)


class Case:
    """A family in both programs, and a LoRA for it as diffusers writes it."""

    def __init__(self, name, folder):
        self.base = folder / name
        module, model = MODELS[name]
        pipe = module.pipeline(model)
        pipe.save_pretrained(self.base)
        self.cls, self.name = type(pipe), name
        layers = {"transformer_lora_layers": adapted(pipe.transformer, TARGETS[name], 1)}
        if name != "chroma":
            layers["text_encoder_lora_layers"] = adapted(pipe.text_encoder, TEXT_TARGETS, 2)
        if name == "sd35":
            layers["text_encoder_2_lora_layers"] = adapted(pipe.text_encoder_2, TEXT_TARGETS, 3)
        self.cls.save_lora_weights(folder / f"{name}-lora", **layers)
        self.file = folder / f"{name}-lora" / LORA
        self.ours = first_devices(jaxdiff.load(self.base, dtype="float32"), 1)
        self.plain = self.generate()

    def theirs(self, *loras, scales=(1.0,)):
        """The latents of diffusers with these files."""
        none = {"text_encoder_3": None, "tokenizer_3": None} if self.name == "sd35" else {}
        pipe = self.cls.from_pretrained(self.base, **none)
        pipe.set_progress_bar_config(disable=True)
        for i, path in enumerate(loras):
            pipe.load_lora_weights(path, adapter_name=str(i))
        if loras:
            pipe.set_adapters([str(i) for i in range(len(loras))], list(scales))
        noise, size = nchw(NOISE), {"height": 16, "width": 16}
        if self.name != "sd35":
            noise = diffusers.FluxPipeline._pack_latents(noise, 1, 16, 8, 8)
        scale = 2.0 if self.name == "flux" else 1.0
        way = {"num_inference_steps": 3, "guidance_scale": scale, "output_type": "latent", **size}
        out = pipe(PROMPT, latents=noise, **way).images
        if self.name != "sd35":
            out = diffusers.FluxPipeline._unpack_latents(out, 16, 16, 2)
        return out.detach().numpy().transpose(0, 2, 3, 1)

    def generate(self):
        way = {"steps": 3, "guidance_scale": 2.0 if self.name == "flux" else 1.0}
        return self.ours(PROMPT, latents=NOISE, output="latent", height=16, width=16, **way).images

    def check(self, want, *, moved=1e-2):
        """Fail unless diffusers' latents are ours, and not those without LoRAs."""
        assert near(self.generate(), want) < 1e-4
        assert near(self.plain, want) > moved


_CASES = {}


@pytest.fixture(params=MODELS)
def case(request, tmp_path_factory, true_masks):
    """A family, without LoRAs before and after."""
    if request.param not in _CASES:
        _CASES[request.param] = Case(request.param, tmp_path_factory.mktemp("lora"))
    yield _CASES[request.param]
    _CASES[request.param].ours.unload_loras()


true_masks = test_flux_pipelines.true_masks


def near(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def of(*names):
    return pytest.mark.parametrize("case", names, indirect=True)


def test_a_file_of_diffusers(case):
    case.ours.load_lora(case.file)
    case.check(case.theirs(case.file))
    case.ours.unload_loras()
    np.testing.assert_array_equal(case.generate(), case.plain)


@of("sd35", "flux")
def test_two_at_once_with_weights(case, tmp_path):
    other = {name: tensor.flip(0) for name, tensor in load_file(case.file).items()}
    save_file(other, tmp_path / "other.safetensors")
    case.ours.load_lora(case.file, 0.7)
    case.ours.load_lora(tmp_path / "other.safetensors", -0.4)
    case.check(case.theirs(case.file, tmp_path / "other.safetensors", scales=(0.7, -0.4)))


def pair(stem, shape, seed, down=".lora_down.weight", up=".lora_up.weight"):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    return {
        f"{stem}{down}": 0.3 * torch.randn((3, columns), generator=generator),
        f"{stem}{up}": 0.3 * torch.randn((rows, 3), generator=generator),
    }


@of("flux")
def test_kohyas_names_of_flux(case, tmp_path):
    """What diffusers reads of them.

    It assumes the width of FLUX.1 for `linear1`, and loses layers outside of the blocks, to whose
    names it does not add `transformer.`.
    """
    tensors = {}
    for i, (module, rows) in enumerate(
        (("img_attn_qkv", 72), ("txt_attn_qkv", 72), ("img_attn_proj", 24), ("txt_mlp_0", 96))
    ):
        stem = f"lora_unet_double_blocks_0_{module}"
        tensors |= pair(stem, (rows, 24), i)
        tensors[f"{stem}.alpha"] = torch.tensor(1.5)
    tensors |= pair("lora_unet_single_blocks_1_linear2", (24, 120), 7)
    save_file(tensors, tmp_path / "k.safetensors")
    case.ours.load_lora(tmp_path / "k.safetensors")
    want = case.theirs(tmp_path / "k.safetensors")
    case.check(want)
    target = tmp_path / "converted.safetensors"
    assert main.run("convert", [str(tmp_path / "k.safetensors"), str(target)]) == 0
    assert near(case.theirs(target), want) < 1e-5


@of("flux")
def test_a_file_written_with_kohyas_names(case, tmp_path):
    """Of separate factors for queries and keys alone, which are one layer there."""
    tensors, ends = {}, {"down": ".lora_A.weight", "up": ".lora_B.weight"}
    for i, layer in enumerate(("to_q", "to_k", "to_v", "add_k_proj", "to_add_out")):
        stem = f"transformer.transformer_blocks.0.attn.{layer}"
        tensors |= pair(stem, (24, 24), i, **ends)
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, source)
    assert main.run("convert", [str(source), str(target), "--format", "kohya"]) == 0
    want = case.theirs(source)
    assert near(case.theirs(target), want) < 1e-5
    case.ours.load_lora(target)
    case.check(want)


@of("flux")
def test_xlabs_names(case, tmp_path):
    tensors, ends = {}, {"down": ".down.weight", "up": ".up.weight"}
    for i, (name, shape) in enumerate(
        {
            "double_blocks.0.processor.qkv_lora1": (72, 24),
            "double_blocks.0.processor.qkv_lora2": (72, 24),
            "double_blocks.0.processor.proj_lora1": (24, 24),
            "double_blocks.0.processor.proj_lora2": (24, 24),
            "single_blocks.1.processor.qkv_lora": (72, 24),
            "single_blocks.1.processor.proj_lora": (24, 120),
        }.items()
    ):
        tensors |= pair(name, shape, i, **ends)
    save_file(tensors, tmp_path / "x.safetensors")
    case.ours.load_lora(tmp_path / "x.safetensors")
    case.check(case.theirs(tmp_path / "x.safetensors"))


def test_an_exported_file(case, tmp_path):
    """Of random factors: diffusers reads what a training exports."""
    objective = DiffusionObjective(pipeline=str(case.base), trainable=LoRA(rank=3, alpha=6.0))
    method = make_training_method(load_base_model(objective), jnp.float32, None)
    rng, shapes = np.random.default_rng(4), method.partition.shapes
    factors = {path: 0.2 * rng.normal(size=leaf.shape) for path, leaf in shapes.items()}
    factors = {path: array.astype(np.float32) for path, array in factors.items()}
    method.export(factors, tmp_path / "export")
    file = tmp_path / "export" / LORA
    assert {name.partition(".")[0] for name in load_file(file)} == {"transformer"}
    case.ours.load_lora(file)
    case.check(case.theirs(file))
