"""Files that hold a VAE: which one it is and how it is written, told by names of tensors alone.

A VAE of Stable Diffusion has the names of the original layout, bare or below one of VAES, or
those of diffusers. TAESD has diffusers' names, or those of its own code, in which the decoder's
layers count one more and both halves are files of their own or one below HALVES.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxdiff.checkpoints import leftovers
from jaxdiff.checkpoints.ldm_reader import vae_from_ldm
from jaxdiff.checkpoints.safetensors import TensorInfo
from jaxdiff.checkpoints.single_file_layouts import UNET, VAES, first_prefix
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.errors import InputError

HALF_NAMES = ("encoder", "decoder")
HALVES = tuple(f"taesd_{name}." for name in HALF_NAMES)
CONFIG = "config.json"  # beside a file of weights
_LAYER = re.compile(r"(\d+)\.((?:conv\.\d+\.|skip\.)?(?:weight|bias))")


class VAEFile(NamedTuple):
    """The tensors of a VAE under the names of its class in diffusers."""

    class_name: str
    layout: str  # "original", "diffusers" or "TAESD"
    tensors: Mapping[str, TensorInfo]
    passed_over: tuple[str, ...] = ()  # kinds of the tensors that trainings left there

    @property
    def latent_channels(self) -> int:
        """Channels of a latent; 0 if no tensor tells."""
        first = "decoder.layers.0" if self.class_name == "AutoencoderTiny" else "decoder.conv_in"
        entry = self.tensors.get(f"{first}.weight")
        return entry.shape[1] if entry is not None and len(entry.shape) == 4 else 0


def find_vae(path: pathlib.Path, entries: Mapping[str, TensorInfo]) -> VAEFile | None:
    """The VAE whose table this is, that of a whole checkpoint included; None if it has none.

    InputError for half a TAESD whose other half is not beside it.
    """
    if any(name.startswith(UNET) for name in entries):
        prefix = first_prefix(entries, VAES)
        entries = {k.removeprefix(prefix): e for k, e in entries.items() if k.startswith(prefix)}
    kinds = {name: leftovers.kind_in_component(_bare(name), "AutoencoderKL") for name in entries}
    own = {name: entry for name, entry in entries.items() if kinds[name] is None}
    for prefix in VAES:
        if own and all(name.startswith(prefix) for name in own):
            own = {name.removeprefix(prefix): e for name, e in own.items()}
    found = _autoencoder(own) or _taesd(path, own)
    passed_over = tuple(kind for kind in kinds.values() if kind is not None)
    return None if found is None else found._replace(passed_over=passed_over)


def _bare(name: str) -> str:
    """A tensor's name without the prefix of the VAE, if it has one."""
    return next((name.removeprefix(p) for p in VAES if name.startswith(p)), name)


def vae_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The file or folder of a VAE, with the files beside it that count too."""
    if not path.is_file():
        return [path]
    encoder, decoder = HALF_NAMES
    names = (CONFIG, path.name.replace(encoder, decoder), path.name.replace(decoder, encoder))
    beside = {path.with_name(name) for name in names if name != path.name}
    return [path, *(each for each in beside if each.is_file())]


def _autoencoder(entries: Mapping[str, TensorInfo]) -> VAEFile | None:
    """The VAE with bare names of the original layout or of diffusers."""
    if "decoder.layers.0.weight" in entries:
        return VAEFile("AutoencoderTiny", "diffusers", entries)
    if "decoder.conv_in.weight" not in entries or "encoder.conv_in.weight" not in entries:
        return None
    if any(name.startswith("encoder.down_blocks.") for name in entries):
        return VAEFile("AutoencoderKL", "diffusers", entries)
    return VAEFile("AutoencoderKL", "original", vae_from_ldm(entries))


def _taesd(path: pathlib.Path, entries: Mapping[str, TensorInfo]) -> VAEFile | None:
    """TAESD in the names of its own code."""
    if any(name.startswith(HALVES) for name in entries):
        halves = [
            {n.removeprefix(half): e for n, e in entries.items() if n.startswith(half)}
            for half in HALVES
        ]
        if sum(map(len, halves)) != len(entries):
            return None
    elif entries and all(map(_LAYER.fullmatch, entries)):
        halves = [entries if half in path.stem else {} for half in HALF_NAMES]
        if sum(map(bool, halves)) != 1:
            return None
        other = _other_half(path, missing="decoder" if halves[0] else "encoder")
        halves = [half or other for half in halves]
    else:
        return None
    tensors = {f"encoder.layers.{name}": entry for name, entry in halves[0].items()}
    for name, entry in halves[1].items():
        number, _, leaf = name.partition(".")
        tensors[f"decoder.layers.{int(number) - 1}.{leaf}"] = entry
    return VAEFile("AutoencoderTiny", "TAESD", tensors)


def _other_half(path: pathlib.Path, *, missing: str) -> Mapping[str, TensorInfo]:
    """The table of the other half of a TAESD, whose name differs in this word only."""
    own = {"encoder": "decoder", "decoder": "encoder"}[missing]
    other = path.with_name(path.name.replace(own, missing))
    if not other.is_file():
        raise InputError(f"{path}: got the {own} of a TAESD alone, expected {other.name} beside it")
    entries = read_weights(other)
    if unknown := sorted(name for name in entries if not _LAYER.fullmatch(name)):
        raise InputError(f"{other}: got {unknown[0]}, expected the layers of a TAESD's {missing}")
    return entries
