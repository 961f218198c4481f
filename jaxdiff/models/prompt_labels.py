"""From a prompt to the labels that classifier guidance aims for.

A classifier's config names its labels. PROMPT_LABELS in its folder says how prompts name them: with
other words (`LabelSynonyms`, also without that file) or in phrases about objects (`PromptGrammar`).
No other module needs to know what the classifier was trained on.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.core.configs import from_mapping, prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Bool, NDArray
from jaxdiff.core.validate import one_of
from jaxdiff.models.attributes import LabelSet

PROMPT_LABELS = "prompt_labels.json"
ARTICLES = ("a", "an")


class LabelTargets(NamedTuple):
    """Masks over the labels of a LabelSet: which are right, and of which that is known."""

    targets: Bool[NDArray, "n"]
    known: Bool[NDArray, "n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelSynonyms:
    """Prompts that name labels anywhere: "a photo of a golden retriever"."""

    # a label, then the words for it; other labels are named by themselves
    words: tuple[tuple[str, ...], ...] = ()

    def check(self, labels: LabelSet) -> None:
        """InputError unless this names some of `labels`, each with words."""
        known = dict.fromkeys(label for group in labels.groups for label in group.labels)
        for row in self.words:
            if len(row) < 2 or not all(map(_words, row[1:])):
                raise InputError(f"words: got {row}, expected a label and words for it")
            one_of("words", row[0], known)

    def labels_of(self, text: str, labels: LabelSet) -> LabelTargets:
        """The labels that a prompt names; of two that overlap, the one with more words.

        An exclusive group is known if one of its labels is named. InputError if nothing is known.
        """
        own = {label: words for label, *words in self.words}
        answers: dict[str, str | None] = {}
        anywhere: dict[str, list[str]] = {}
        for group in labels.groups:
            phrases = {
                _words(word): label for label in group.labels for word in own.get(label, [label])
            }
            longest = sorted(filter(None, phrases), key=len, reverse=True)
            pattern = re.compile(rf"\b({'|'.join(map(re.escape, longest)) or '$^'})\b")
            named = list(dict.fromkeys(phrases[found] for found in pattern.findall(_words(text))))
            if not group.exclusive:
                anywhere[group.name] = named
            elif len(named) == 1:
                answers[group.name] = named[0]
        result = label_targets(labels, answers, anywhere)
        if not result.known.any():
            examples = [own.get(name, [name])[0] for g in labels.groups for name in g.labels[:2]]
            raise _nothing_known(text, examples)
        return result


def _words(text: str) -> str:
    """The words of a text in lower case, with single spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _nothing_known(text: str, examples: Sequence[str]) -> InputError:
    return InputError(
        f"prompt: got {text!r:.80}, expected words of the classifier's labels: "
        f"{', '.join(examples)}, ..."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptGrammar:
    """How captions such as "a small red circle above a blue star on a pink background" name labels.

    A caption has a phrase for each object, and a relation between two of them. The label group of
    `kind` at `place` is called "place_kind", and "kinds" the group of what is there in any place.
    """

    background: str  # the group of labels in "on a LABEL background", where that word is its name
    layout: str  # the group that says how objects are arranged
    single: str  # its label for one object
    # the words between two phrases, their label of the layout, the place of the object named first
    relations: tuple[tuple[str, ...], ...]
    places: tuple[str, ...]
    kinds: tuple[str, ...]

    def check(self, labels: LabelSet) -> None:
        """InputError unless `labels` have all that this names."""
        for relation in self.relations:
            if len(relation) != 3:
                raise InputError(
                    f"relations: got {relation}, expected words, a label of the layout and a place"
                )
            _, layout, place = relation
            labels.index(self.layout, layout)
            one_of("place", place, self.places)
        labels.index(self.layout, self.single)
        names = [f"{place}_{kind}" for place in self.places for kind in self.kinds]
        for name in (self.background, *names, *(f"{kind}s" for kind in self.kinds)):
            labels.group(name)

    def labels_of(self, text: str, labels: LabelSet) -> LabelTargets:
        """The labels that a prompt asks for; it understands the captions completely.

        Each attribute is known once: at its place ("a red circle above a blue square"), or as being
        there at all where the places are not clear ("red and blue"). Other words leave unknown what
        they stand for: the shape in "a red dog above a star", the background in "on a dark
        background". InputError if nothing is known.
        """
        words = " ".join(re.findall("[a-z]+", text.lower()))
        grounds = labels.group(self.background).labels
        pattern = re.compile(
            rf"\bon an? ([a-z]+) {self.background}\b"
            rf"|(?:\ba )?\b({'|'.join(grounds)}) {self.background}\b"
        )
        named = {a or b for a, b in pattern.findall(words)} & {*grounds}
        answers: dict[str, str | None] = {}
        if len(named) == 1:
            answers[self.background] = named.pop()
        between = re.compile(rf"\b({'|'.join(relation for relation, *_ in self.relations)})\b")
        first, *others = between.split(pattern.sub(" ", words))
        vocabulary = {kind: labels.group(f"{self.places[0]}_{kind}").labels for kind in self.kinds}
        phrases = [_Phrase.of(part, vocabulary) for part in (first, *others[1::2])]
        relations = others[::2]
        anywhere: dict[str, list[str]] = {}
        looks = [phrase.attributes() for phrase in phrases]
        singles = all(phrase.single for phrase in phrases)
        if len(relations) == 1 and singles:
            layout, place = {words: others for words, *others in self.relations}[relations[0]]
            answers |= self.in_places(layout, looks if place == self.places[0] else looks[::-1])
        elif not relations and singles and not phrases[0].foreign and any(looks[0].values()):
            answers |= self.in_places(self.single, looks)
        else:
            for kind in self.kinds:
                anywhere[f"{kind}s"] = [w for phrase in phrases for w in phrase.words[kind]]
        result = label_targets(labels, answers, anywhere)
        if not result.known.any():
            examples = [word for words in vocabulary.values() for word in words[:2]]
            raise _nothing_known(text, examples)
        return result

    def in_places(
        self, layout: str, looks: Sequence[Mapping[str, str | None]]
    ) -> dict[str, str | None]:
        """The label of each group when objects that look like this are at the places, in order."""
        answers: dict[str, str | None] = {self.layout: layout}
        for place, look in zip(self.places, looks, strict=False):
            answers |= {f"{place}_{kind}": word for kind, word in look.items()}
        return answers


PromptLabels = LabelSynonyms | PromptGrammar


def prompt_labels(values: Mapping[str, Any], labels: LabelSet, *, source: str) -> PromptLabels:
    """How prompts name `labels`, from the content of PROMPT_LABELS, read from `source`.

    Raises InputError.
    """
    kind = LabelSynonyms if values.keys() <= {"words"} else PromptGrammar
    found = from_mapping(kind, values, source=source)
    with prefix_errors(source):
        found.check(labels)
    return found


def label_targets(
    labels: LabelSet,
    answers: Mapping[str, str | None],
    anywhere: Mapping[str, Iterable[str | None]],
) -> LabelTargets:
    """The right labels of exclusive groups (None: not known), and those known to be there."""
    result = LabelTargets(np.zeros(labels.width, bool), np.zeros(labels.width, bool))
    for name, label in answers.items():
        if label is not None:
            result.targets[labels.index(name, label)] = True
            result.known[labels.slices[name]] = True
    for name, present in anywhere.items():
        for label in present:
            if label is not None:
                at = labels.index(name, label)
                result.targets[at] = result.known[at] = True
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Phrase:
    """The words of a prompt about one object, or about some that are not clearly one."""

    words: Mapping[str, tuple[str, ...]]  # by kind
    articles: int
    foreign: int  # words that name no label

    @classmethod
    def of(cls, text: str, vocabulary: Mapping[str, Sequence[str]]) -> "_Phrase":
        words = text.split()
        found = {kind: tuple(w for w in words if w in known) for kind, known in vocabulary.items()}
        articles = sum(word in ARTICLES for word in words)
        foreign = len(words) - articles - sum(map(len, found.values()))
        return cls(words=found, articles=articles, foreign=foreign)

    @property
    def single(self) -> bool:
        """Whether nothing suggests more than one object."""
        return self.articles <= 1 and all(len(words) <= 1 for words in self.words.values())

    def attributes(self) -> dict[str, str | None]:
        """The label of each kind, None where the phrase has none."""
        return {kind: words[0] if words else None for kind, words in self.words.items()}
