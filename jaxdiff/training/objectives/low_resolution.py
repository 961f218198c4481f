"""Images to enlarge, which a training makes of its images, with noise (2205.11487, section 2.4)."""

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, Key
from jaxdiff.families.extras import LOW_RESOLUTION, LOW_RESOLUTION_LEVEL, LOW_RESOLUTION_NOISE
from jaxdiff.training.step import per_sample_normal, per_sample_split, per_sample_uniform


def low_resolution_columns(
    images: Float[Array, "b h w 3"],
    factor: int,
    latent_size: tuple[int, ...],
    key: Key[Array, "..."],
) -> dict[str, Array]:
    """The columns of a network that enlarges images of a `factor`th of the side of `images`.

    The levels of the noise, whose size is `latent_size`, are uniform. InputError for sides that are
    no multiples of the factor.
    """
    b, height, width, _ = images.shape
    if height % factor or width % factor:
        raise InputError(
            f"objective.enlargement: got {factor}, expected a divisor of the sides {height}x{width}"
        )
    noise_key, level_key = per_sample_split(key, b, 2)
    return {
        LOW_RESOLUTION: shrink(images, factor),
        LOW_RESOLUTION_NOISE: per_sample_normal(noise_key, (b, *latent_size, 3)),
        LOW_RESOLUTION_LEVEL: per_sample_uniform(level_key, (b,)),
    }


def shrink(images: Float[Array, "b h w 3"], factor: int) -> Float[Array, "b h3 w3 3"]:
    """The means of squares of `factor` pixels a side."""
    b, height, width, channels = images.shape
    squares = images.reshape(b, height // factor, factor, width // factor, factor, channels)
    return squares.mean((2, 4))
