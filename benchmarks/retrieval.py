"""How often CLIP finds the caption of a generated image.

    python benchmarks/retrieval.py runs/emoji/unet/export runs/emoji/clip/export/clip \
        runs/emoji/pictures --captions 200 --candidates 50

Generates an image for each of `--captions` captions of the folder DATA (its metadata.jsonl), and
lets the CLIP model compare it with the right caption and `--candidates` - 1 others of the folder.
Prints the fraction of images for which the right one comes first (R-precision, 1711.10485, section
4.1), and the same for the images of the folder, which bounds what a model can reach.
"""

import argparse
import json
import pathlib
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import jaxdiff
from jaxdiff.checkpoints.clip_vision import read_image_processor
from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.tokenizers import read_tokenizer
from jaxdiff.core.text import decode_text
from jaxdiff.core.types import Array, Float, NDArray, UInt8
from jaxdiff.data.tokenizer import tokenize
from jaxdiff.models.clip import CLIPModel
from jaxdiff.pipeline.tokenizers import tokenizer_of

BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path, help="a diffusers folder")
    parser.add_argument("clip", type=pathlib.Path, help="the folder of a CLIP model")
    parser.add_argument("data", type=pathlib.Path, help="a folder of images with metadata.jsonl")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    table = options.data / "metadata.jsonl"
    rows = [json.loads(line) for line in decode_text(table.read_bytes(), str(table)).splitlines()]
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(rows))[: options.captions]
    captions = [rows[i]["text"] for i in chosen]
    pipe = jaxdiff.load(options.model)
    sampling = {"guidance_scale": options.guidance_scale, "steps": options.steps}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    generated = np.concatenate(
        [
            pipe(captions[i : i + BATCH], seed=i, output="numpy", **sampling).images
            for i in range(0, len(captions), BATCH)
        ]
    )
    side = generated.shape[1]
    originals = np.stack(
        [
            np.asarray(Image.open(options.data / rows[i]["file_name"]).resize((side, side)))
            for i in chosen
        ]
    )
    clip = cast(CLIPModel, read_component(options.clip, dtype=jnp.float32).module)
    processor = read_image_processor(options.clip, clip.vision_model.config.image_size)
    tokenizer = tokenizer_of(read_tokenizer(options.model / "tokenizer"))
    texts = np.asarray(
        clip.text_embeds(jnp.asarray(tokenize(tokenizer, [r["text"] for r in rows])))
    )
    # for each caption: itself, then others that read differently
    others = [
        rng.choice(
            [j for j in range(len(rows)) if rows[j]["text"] != rows[i]["text"]],
            options.candidates - 1,
            replace=False,
        )
        for i in chosen
    ]
    candidates = np.concatenate([chosen[:, None], np.stack(others)], axis=1)

    @jax.jit
    def embed(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b p"]:
        return clip.image_embeds(processor(images.astype(jnp.float32) / 127.5 - 1))

    def precision(images: UInt8[NDArray, "b h w 3"]) -> float:
        similarity = np.einsum("bp,bkp->bk", np.asarray(embed(images)), texts[candidates])
        return float(np.mean(similarity.argmax(axis=1) == 0))

    for name, images in (("generated", generated), ("originals", originals)):
        first = precision(images)
        error = (first * (1 - first) / len(images)) ** 0.5
        print(f"{name}: the right caption first in {first:.3f} ± {error:.3f} of {len(images)}")


if __name__ == "__main__":
    main()
