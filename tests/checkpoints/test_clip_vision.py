"""Image encoders of pipeline folders, and what their preprocessor_config.json says."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from jaxdiff.checkpoints.clip_vision import MEAN, STD, image_processor_of, read_image_processor
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.models.clip import CLIPVisionModel
from jaxdiff.models.image_processor import CLIPImageProcessor

CLIP = CLIPImageProcessor(size=224, mean=MEAN, std=STD, shortest_edge=224)
NORMALISED = {"do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD)}
# As versions of transformers wrote them.
FILES = {
    "4.20": {
        "crop_size": 224,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "resample": 3,
        "size": 224,
        **NORMALISED,
    },
    "4.26": {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_rescale": True,
        "do_resize": True,
        "image_processor_type": "CLIPImageProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 224},
        **NORMALISED,
    },
    "without keys": {},
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_all_versions(tmp_path, name):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(FILES[name]))
    assert read_image_processor(tmp_path, 224) == CLIP


def test_other_settings():
    square = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    assert image_processor_of(square, 32, source="here") == CLIPImageProcessor(
        size=32, mean=MEAN, std=STD, crops=False
    )
    larger = image_processor_of({"size": 36, "crop_size": 32}, 32, source="here")
    assert larger == dataclasses.replace(CLIP, size=32, shortest_edge=36)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize: got False, expected one of True"),
        ({"resample": 2}, "resample: got 2, expected one of 3"),
        ({"do_pad": True}, "do_pad: got True"),
        ({"rescale_factor": 0.5}, "rescale_factor: got 0.5, expected 1/255"),
        ({"do_center_crop": False}, "size, crop_size, do_center_crop: got .* images of 224 x 224"),
        ({"crop_size": 256}, "size, .*: got {'shortest_edge': 224}, 256, True, expected images of"),
        ({"crop_size": {"height": 224}}, "crop_size: got"),
        ({"size": {"shortest_edge": 200}}, "shortest_edge: got 200, expected at least the size, 2"),
        ({"size": {"longest_edge": 224}}, "size: got"),
        ({"image_mean": [0.5]}, "image_mean: got"),
        ({"image_std": 0.5}, "image_std: got 0.5"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=f"^here: {message}"):
        image_processor_of(FILES["4.26"] | changes, 224, source="here")


@pytest.fixture
def with_encoder(parts, components, tmp_path):
    """A pipeline with an image encoder, and its image processor."""
    encoder = components["CLIPVisionModelWithProjection"]
    size = encoder.module.config.image_size
    more = dataclasses.replace(
        parts,
        class_name="KandinskyV22PriorPipeline",
        components={**parts.components, "image_encoder": encoder},
        image_processors={"image_processor": {"crop_size": size, "size": size}},
    )
    write_pipeline(tmp_path / "model", more)
    return tmp_path / "model"


def test_pipelines_with_an_image_encoder(with_encoder, tmp_path):
    read = read_pipeline(with_encoder)
    encoder = read.components["image_encoder"].module
    assert isinstance(encoder, CLIPVisionModel)
    assert encoder.visual_projection is not None
    size = encoder.config.image_size
    assert read.image_processors == {"image_processor": {"crop_size": size, "size": size}}
    index = json.loads((with_encoder / "model_index.json").read_text())
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
    assert index["image_processor"] == ["transformers", "CLIPImageProcessor"]
    write_pipeline(tmp_path / "again", read)
    assert read_pipeline(tmp_path / "again").image_processors == read.image_processors


def test_an_image_processor_of_another_class(with_encoder):
    path = with_encoder / "model_index.json"
    index = json.loads(path.read_text())
    index["image_processor"] = ["transformers", "ViTImageProcessor"]
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match="image_processor: class: got 'ViTImageProcessor'"):
        read_pipeline(with_encoder)


def test_sides():
    """Of an image twice as wide the middle counts, and all of it where nothing is cut."""
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255
    shown = CLIPImageProcessor(size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    np.testing.assert_array_equal(shown.preprocess([wide]), np.ones((1, 8, 8, 3)))
    squeezed = dataclasses.replace(shown, crops=False).preprocess([wide])
    assert squeezed[0, :, 0].max() == 0 == squeezed[0, :, -1].max()
    assert squeezed[0, :, 4].min() == 1
    with pytest.raises(InputError, match="images: got mode L, expected RGB"):
        shown.preprocess([Image.fromarray(wide[..., 0])])
    larger = dataclasses.replace(shown, shortest_edge=16).preprocess([wide])
    np.testing.assert_array_equal(larger, np.ones((1, 8, 8, 3)))
