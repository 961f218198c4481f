"""`Cascade`: a model and the stages that follow it, in one call; hires fix and refiner as well."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxdiff.core.aliases import rename_arguments
from jaxdiff.core.errors import InputError
from jaxdiff.pipeline.embedding_decoder import check_stages, following_stage
from jaxdiff.pipeline.nonfinite import NonFiniteImageError
from jaxdiff.pipeline.output import Output, Settings
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.pipeline.stages import (
    START,
    STRENGTH,
    HiresFix,
    Refiner,
    Stage,
    first_requests,
    output_for,
    run_stages,
)

_SETTINGS = Settings.__dataclass_fields__.keys() - {"output"}


class Cascade:
    """A model and what follows it: models that enlarge images, hires fixes, refiners.

    `stages` are `Stage`s, or models: those that enlarge the images of the one before, such as the
    second and third of DeepFloyd IF, and decoders of the embeddings of a prior, as Kandinsky has
    them. InputError for other models.
    """

    def __init__(self, first: Pipeline, *stages: Pipeline | Stage) -> None:
        self.first = first
        self.stages = [
            stage if isinstance(stage, Stage) else following_stage(stage, first) for stage in stages
        ]
        check_stages(first, self.stages)

    def __repr__(self) -> str:
        return f"Cascade({', '.join(map(repr, self.pipes))})"

    @property
    def pipes(self) -> tuple[Pipeline, ...]:
        """The models, in the order in which they run."""
        return (self.first, *(stage.pipe for stage in self.stages))

    @rename_arguments
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        stage_options: Sequence[Mapping[str, Any]] = (),
        output: str = "pil",
        **options: Any,
    ) -> Output:
        """Generate with the first model and go on with each stage.

        The arguments are those of calling the first model. Stages that enlarge images share its
        prompts and seeds; `stage_options` has the options of each stage, such as `noise_level`.
        Raises InputError.
        """
        stages = self._with_options(stage_options)
        settings = {name: options[name] for name in _SETTINGS & options.keys()}
        arguments: dict[str, Any] = {"prompt": prompt}
        arguments |= {name: value for name, value in options.items() if name not in settings}
        others = {name for stage in stages for name in stage.own_options}
        others -= self.first.family.options.keys()
        own = {name: value for name, value in arguments.items() if name not in others}
        requests = first_requests(stages, self.first.resolve(**own))
        kind = output_for(self.first, stages, output)
        out = self.first.generate(requests, output=kind, **settings)
        out = run_stages(stages, out, arguments, output=output, **settings)
        if out.failures:
            raise NonFiniteImageError(out)
        return out

    def _with_options(self, options: Sequence[Mapping[str, Any]]) -> list[Stage]:
        if len(options) > len(self.stages):
            raise InputError(
                f"stage_options: got {len(options)}, expected one for each of the "
                f"{len(self.stages)} stages at most"
            )
        missing = [{} for _ in range(len(self.stages) - len(options))]
        pairs = zip(self.stages, [*options, *missing], strict=True)
        return [stage.with_options(own) if own else stage for stage, own in pairs]


@rename_arguments
def hires_fix(
    pipe: Pipeline,
    prompt: str | Sequence[str],
    *,
    scale: float = 2.0,
    hires_strength: float = STRENGTH,
    output: str = "pil",
    **options: Any,
) -> Output:
    """Generate at the given size, upscale the latents by `scale`, refine with `hires_strength`.

    Models compose images best at the size that they were trained at. The other arguments are those
    of calling `pipe`. Sizes are rounded to what the model can generate. Raises InputError.
    """
    stage = HiresFix(pipe, scale, hires_strength)
    return Cascade(pipe, stage)(prompt, output=output, **options)


def refine(
    base: Pipeline,
    refiner: Pipeline,
    prompt: str | Sequence[str],
    *,
    start: float = START,
    output: str = "pil",
    **options: Any,
) -> Output:
    """Run `base` for the fraction `start` of the denoising process, and `refiner` for the rest.

    The other arguments are those of calling `base`; see Refiner. Raises InputError.
    """
    stage = Refiner(refiner, start)
    stage.check(base)
    return Cascade(base, stage)(prompt, output=output, **options)
