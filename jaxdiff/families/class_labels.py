"""The class of an image as an input of the network, named by the prompt or by a number."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.names_elsewhere import did_you_mean
from jaxdiff.core.types import Array, Bool, Int, NDArray
from jaxdiff.families.extras import Extra, ExtraInputs, Option

MAX_LABEL = 1_000_000
COLUMN = "class_labels"  # of training batches


@dataclasses.dataclass(frozen=True)
class ClassLabel(Extra):
    """The class of an image: that of its prompt, or the option `class_label`.

    A prompt is the number of a class, its name, or one of the names that commas separate in it; no
    text, of a null stream for example, is no class, whose label follows the last one.
    """

    num_classes: int
    names: tuple[str, ...] = ()  # of each class; none: classes have numbers only
    argument = "class_labels"
    reads_prompt = True
    options: ClassVar[Mapping[str, Option]] = {
        "class_label": Option(int | None, None, 0, MAX_LABEL),  # None: that of the prompt
    }

    @functools.cached_property
    def _labels(self) -> dict[str, tuple[int, ...]]:
        """The classes of each name in lower case."""
        found: dict[str, list[int]] = {}
        for label, name in enumerate(self.names):
            for each in dict.fromkeys((name, *name.split(","))):
                found.setdefault(each.strip().casefold(), []).append(label)
        return {name: tuple(labels) for name, labels in found.items() if name}

    def label_of(self, text: str | None, *, option: str = "prompt") -> int:
        """The class that `text` names; InputError, for `option`, if it names none or several."""
        name = (text or "").strip().casefold()
        if not name:
            return self.num_classes
        if name.isdecimal() and int(name) < self.num_classes:
            return int(name)
        labels = self._labels.get(name, ())
        if len(labels) == 1:
            return labels[0]
        numbers = f"a number from 0 to {self.num_classes - 1}"
        if labels:
            listed = " and ".join(map(str, labels))
            raise InputError(
                f"{option}: got {text!r:.60}, the name of the classes {listed}, expected {numbers}"
            )
        expected = f"the name of a class or {numbers}" if self.names else numbers
        hint = did_you_mean(name, list(self._labels))
        raise InputError(f"{option}: got {text!r:.60}, expected {expected}{hint}")

    def check(self, settings: Mapping[str, Any], texts: Sequence[str]) -> None:
        """InputError for a text that names no class, and for two classes of one image."""
        prompt, *_ = [self.label_of(text) for text in texts[:-1]]
        self.label_of(texts[-1], option="negative_prompt")
        label = settings.get("class_label")
        if label is None:
            return
        if label >= self.num_classes:
            raise InputError(
                f"class_label: got {label}, expected a number from 0 to {self.num_classes - 1}"
            )
        if prompt != self.num_classes:
            raise InputError(
                f"class_label: got {label} besides the prompt {texts[0]!r:.60}, expected one of "
                "them"
            )

    def of_request(self, inputs: ExtraInputs) -> Int[NDArray, "b k"]:
        """The option for streams of the prompt, else the class of what each stream reads."""
        rows = [
            [
                options["class_label"] if own and "class_label" in options else self.label_of(text)
                for own, text in zip(inputs.prompted, texts, strict=True)
            ]
            for options, texts in zip(inputs.options, inputs.texts, strict=True)
        ]
        return np.array(rows, np.int32)

    def columns(self, captions: Sequence[str]) -> dict[str, NDArray]:
        """The classes that captions name."""
        return {COLUMN: np.array([self.label_of(text) for text in captions], np.int32)}

    def of_batch(self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]) -> Int[Array, "b"]:
        """The class of each caption, none where it is dropped."""
        return jnp.where(dropped, self.num_classes, batch[COLUMN])


def class_names(options: Mapping[str, Any], num_classes: int, *, source: str) -> tuple[str, ...]:
    """The names of classes in `id2label` of model_index.json; InputError unless all have one."""
    table = options.get("id2label")
    if table is None:
        return ()
    if not isinstance(table, Mapping) or not all(isinstance(n, str) for n in table.values()):
        raise InputError(f"{source}: id2label: got {table!r:.80}, expected names by number")
    missing = [i for i in range(num_classes) if str(i) not in table]
    if missing or len(table) != num_classes:
        raise InputError(
            f"{source}: id2label: got {len(table)} names, expected one of each of {num_classes} "
            "classes"
        )
    return tuple(table[str(i)] for i in range(num_classes))
