"""From a request to token ids by stream, and guidance scales."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from jaxdiff.families.base import Family
from jaxdiff.guidance.base import Guidance, GuidanceScales, Stream
from jaxdiff.guidance.registry import parse
from jaxdiff.pipeline.and_prompts import SubPrompt, split_and
from jaxdiff.pipeline.classifier_guidance import GuidanceTargets
from jaxdiff.pipeline.conditioning import TokenizedPrompts, tokenize_prompts
from jaxdiff.pipeline.inputs import TokenizedRequests
from jaxdiff.pipeline.prompts import WeightedText
from jaxdiff.pipeline.prompts import parse as parse_syntax
from jaxdiff.pipeline.request import Request, Requests
from jaxdiff.pipeline.vocabulary import TextualInversionTokenizer

Text = str | None  # None: not given


class PromptTokenizer(NamedTuple):
    """The tokenizers of a model."""

    family: Family
    vocabularies: Sequence[TextualInversionTokenizer]
    closed: bool = False  # whether words that are several tokens were never trained on

    def tokenize(self, requests: Requests, streams: Sequence[Stream]) -> list[TokenizedPrompts]:
        """The tokenized prompts of each image.

        Warns of truncated prompts, and of words that the model was not trained on.
        """
        found = []
        all_texts: list[Text] = []
        for request in requests:
            texts = _texts(request, streams)[: len(self.vocabularies)]
            words, cut = tokenize_prompts(
                self.family, self.vocabularies, texts, syntax=request.prompt_syntax
            )
            if cut:
                message = (
                    f"prompt: truncated, {cut} tokens are missing from the end of "
                    f"{request.prompt!r:.60}"
                )
                warnings.warn(message, stacklevel=6)
            found.append(words)
            all_texts += texts[0]
        if self.closed:
            self._warn_of_unseen_words(all_texts, syntax=requests[0].prompt_syntax)
        return found

    def _warn_of_unseen_words(self, texts: Sequence[Text], *, syntax: bool) -> None:
        vocabulary = self.vocabularies[0]
        own = [text for text in dict.fromkeys(texts) if text is not None]
        parsed = [parse_syntax(text) if syntax else [WeightedText(text, 1)] for text in own]
        pieces = [piece.text or "" for each in parsed for piece in each]
        unseen = dict.fromkeys(word for piece in pieces for word in vocabulary.unseen(piece))
        if unseen:
            message = (
                f"prompt: this model was not trained on {', '.join(map(repr, unseen))}; "
                f"it knows {', '.join(vocabulary.whole_words())}"
            )
            warnings.warn(message, stacklevel=7)


def guidance_rule(requests: Requests) -> Guidance:
    """The cheapest rule that guides all of the images; InputError if there is none."""
    prompts = max(map(len, map(_composed, requests)))
    rule = parse(requests[0].guidance).for_prompts(prompts)
    return rule.simplify(requests.guidance_scales)


def tokenize_requests(
    requests: Requests,
    rule: Guidance,
    tokenizer: PromptTokenizer,
    guidance_tokenizer: PromptTokenizer | None,
    targets: GuidanceTargets,
) -> TokenizedRequests:
    """Tokenize requests; `guidance_tokenizer` is that of a weaker guidance model."""
    by_network = {
        name: [s for s in rule.streams if s.network == name] for name in ("main", "guidance_model")
    }
    words, guide_words = tokenizer.tokenize(requests, by_network["main"]), []
    if guidance_tokenizer is not None and by_network["guidance_model"]:
        guide_words = guidance_tokenizer.tokenize(requests, by_network["guidance_model"])
    return TokenizedRequests(words, guide_words, _guidance_scales(requests), targets)


def _guidance_scales(requests: Requests) -> GuidanceScales:
    scales = np.asarray(requests.guidance_scales, np.float32)
    negative = weights = None
    if any(scale is not None for scale in requests.negative_scales):
        pairs = zip(requests.negative_scales, requests.guidance_scales, strict=True)
        negative = np.asarray([w if wn is None else wn for wn, w in pairs], np.float32)
    composed = [_composed(request) for request in requests]
    longest = max(map(len, composed))
    if longest > 1:
        weights = np.zeros((len(composed), longest), np.float32)
        for row, parts in zip(weights, composed, strict=True):
            row[: len(parts)] = [part.weight for part in parts]
    return GuidanceScales(*cast(Any, (scales, negative, weights)))  # of host arrays


def _composed(request: Request) -> list[SubPrompt]:
    """The parts of the prompt."""
    return split_and(request.prompt, syntax=request.prompt_syntax)


def _texts(request: Request, streams: Sequence[Stream]) -> list[list[Text]]:
    """What each of two text encoders reads in the streams of an image."""
    by_encoder = []
    for negative, own in request.prompts_for_encoder():
        parts = split_and(own, syntax=request.prompt_syntax)
        by_encoder.append([_text(stream, negative, parts) for stream in streams])
    return by_encoder


def _text(stream: Stream, negative: Text, parts: Sequence[SubPrompt]) -> Text:
    if stream.prompt_source == "negative":
        return negative
    # Images with fewer prompts than others have null streams of weight 0.
    if stream.prompt_source == "null" or stream.prompt_index >= len(parts):
        return None
    return parts[stream.prompt_index].text
