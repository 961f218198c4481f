"""Single files against diffusers: what its converters make of them, and what it loads."""

import diffusers
import numpy as np
import pytest
import torch
import transformer_files as models
from diffusers.loaders import single_file_utils
from original_keys import oracle
from originals import write_safetensors

from jaxdiff.checkpoints.layout_flux import CHROMA_TABLE, FLUX_TABLE
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.checkpoints.safetensors import read_table, read_tensor
from jaxdiff.checkpoints.single_file import write_single_file
from jaxdiff.checkpoints.single_file_layouts import UNET

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder and the file of a family."""

    def write(name):
        place = tmp_path_factory.mktemp(name)
        write_pipeline(place / "folder", models.components(name, place))
        write_single_file(place / "file.safetensors", read_pipeline(place / "folder"))
        return place / "folder", place / "file.safetensors"

    return write


def torch_arrays(path):
    return {name: torch.from_numpy(values.copy()) for name, values in models.arrays(path).items()}


def assert_same(theirs, ours):
    assert theirs.keys() == ours.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(theirs[name].numpy(), values, err_msg=name)


def test_sd3(written):
    """Every network of the pipeline that diffusers loads from the file."""
    folder, file = written("sd3")
    weights = "diffusion_pytorch_model.safetensors"
    made = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(
        {name: t for name, t in torch_arrays(file).items() if name.startswith(UNET)}
    )
    assert_same(made, models.arrays(folder / "transformer" / weights))
    wanted = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipe = diffusers.StableDiffusion3Pipeline.from_single_file(
        file, config=str(folder), local_files_only=True
    )
    made = single_file_utils.convert_sd3_t5_checkpoint_to_diffusers(torch_arrays(file))
    assert_same(made, models.arrays(folder / "text_encoder_3" / "model.safetensors"))
    # Of T5, diffusers leaves the second name of the embeddings without values.
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        theirs, ours = (getattr(each, name).state_dict() for each in (pipe, wanted))
        assert theirs.keys() == ours.keys()
        for key, tensor in ours.items():
            assert torch.equal(theirs[key], tensor), f"{name}: {key}"


TABLES = {"flux_dev": FLUX_TABLE, "chroma": CHROMA_TABLE}


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_flux(tmp_path, name):
    """All rows of the published network, with one column of each matrix and a block of each kind.

    The converters of diffusers cut rows at the numbers of the published networks.
    """
    convert = getattr(
        single_file_utils,
        f"convert_{name.removesuffix('_dev')}_transformer_checkpoint_to_diffusers",
    )
    rng = np.random.default_rng(0)
    arrays = {
        key: rng.normal(size=(shape[0], *(1,) * (len(shape) - 1))).astype(np.float32)
        for key, shape in oracle(name)["original"].items()
        if "_blocks." not in key or "_blocks.0." in key
    }
    path = write_safetensors(tmp_path / "x.safetensors", arrays)
    ours = {key: read_tensor(e) for key, e in TABLES[name].from_original(read_table(path)).items()}
    assert_same(convert(torch_arrays(path)), ours)


def test_unet_of_latent_diffusion(written):
    folder, file = written("ldm")
    checkpoint = torch_arrays(file)
    config = diffusers.UNet2DConditionModel.load_config(folder / "unet")
    made = single_file_utils.convert_ldm_unet_checkpoint(dict(checkpoint), config)
    weights = "diffusion_pytorch_model.safetensors"
    assert_same(made, models.arrays(folder / "unet" / weights))
    vae = diffusers.AutoencoderKL.load_config(folder / "vqvae")
    made = single_file_utils.convert_ldm_vae_checkpoint(dict(checkpoint), vae)
    assert_same(made, models.arrays(folder / "vqvae" / weights))
