"""What a loaded model can be given: LoRAs, textual inversions, auxiliary networks."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxdiff.checkpoints.lora_names import weights_file
from jaxdiff.core.aliases import rename_arguments
from jaxdiff.core.errors import InputError
from jaxdiff.pipeline.auxiliary_models import AuxiliaryModels
from jaxdiff.pipeline.compiled_model import CompiledModel
from jaxdiff.pipeline.lora import LoRAManager
from jaxdiff.pipeline.request import Requests
from jaxdiff.pipeline.textual_inversion import TextualInversionManager


class Addons:
    """The part of `Pipeline` that changes what a loaded model consists of."""

    _loras: LoRAManager
    _inversions: TextualInversionManager
    _auxiliary: AuxiliaryModels
    stages: CompiledModel
    text_encoders: list[Any]
    network: Any
    adapter: Any  # of the network

    @property
    def loras(self) -> dict[str, float]:
        """The scale of each applied LoRA."""
        return dict(self._loras.scales)

    def load_lora(
        self, source: str | pathlib.Path, scale: float = 1.0, *, name: str | None = None
    ) -> str:
        """Apply the LoRA in a file or folder, besides those already applied; returns its name.

        LoHa, LoKr, DoRA and other formats likewise. Tokens that come with it are added as
        `load_textual_inversion` does. Compiles nothing but for these. `name` is the file's by
        default. Raises InputError, with the model unchanged, for factors that fit no layer.
        """
        file = weights_file(pathlib.Path(source))
        tokens = self._inversions.read_bundled(file)
        name = self._loras.load(pathlib.Path(source), name, scale)
        self._inversions.add(tokens, bundled=True)
        self._weights_changed()
        return name

    def set_loras(self, scales: Mapping[str, float]) -> None:
        """Apply loaded LoRAs with other scales; LoRAs that `scales` leaves out are not applied."""
        self._loras.set(scales)
        self._weights_changed()

    def unload_loras(self) -> None:
        """Remove all LoRAs and the tokens that came with them; restores every weight exactly."""
        self._loras.remove()
        self._inversions.remove(only_bundled=True)
        self._weights_changed()

    @property
    def textual_inversion_tokens(self) -> tuple[str, ...]:
        """The tokens of the loaded textual inversions."""
        return self._inversions.tokens

    @rename_arguments
    def load_textual_inversion(
        self, source: str | pathlib.Path, *, token: str | None = None
    ) -> str:
        """Add the token of a textual inversion file; returns the token, for use in prompts.

        `token` replaces the file's own. Nothing is compiled again. Raises InputError, with the
        model unchanged, for vectors that do not fit and for a token that exists.
        """
        added = self._inversions.load(pathlib.Path(source), token)
        self._weights_changed()
        return added

    def unload_textual_inversions(self) -> None:
        """Remove the tokens of all textual inversions."""
        self._inversions.remove()
        self._weights_changed()

    def load_classifier(self, folder: str | pathlib.Path) -> None:
        """Load the classifier of noisy latents in `folder`, for `classifier_scale`."""
        self._auxiliary.load_classifier(pathlib.Path(folder))

    def load_clip(self, folder: str | pathlib.Path) -> None:
        """Load the CLIP model in `folder`, for `clip_scale`."""
        self._auxiliary.load_clip(pathlib.Path(folder))

    def auxiliary_fingerprints(self, requests: Requests) -> dict[str, str]:
        """A short hash of the classifier and of the CLIP model, where requests use them.

        InputError if the one that they need is missing.
        """
        return self._auxiliary.fingerprints(requests)

    def set_guidance_model(self, model: "Addons | None") -> None:
        """Set the weaker model of autoguidance; None removes it.

        Raises InputError unless it has the same latent channels and noise schedule.
        """
        if not isinstance(model, Addons | None):
            raise InputError(f"guidance_model: got {model!r:.60}, expected a pipeline or None")
        self._auxiliary.set_guidance_model(None if model is None else model._auxiliary.own)

    set_guide = set_guidance_model  # its former name

    def _weights_changed(self) -> None:
        self.stages.set_weights(self.text_encoders, self.adapter.module)
