"""Options of requests that are images."""

from typing import Any

import numpy as np

from jaxdiff.data.image_arrays import image_list, to_pil
from jaxdiff.families.extras import Option


class ImageOption(Option):
    """An option that is an image (PIL, uint8 (h, w, 3), or a file), or one for each image."""

    def is_column(self, value: Any) -> bool:
        """Whether `value` has an image for each image."""
        return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 3)

    def check(self, name: str, value: Any) -> Any:
        """`value` as uint8 (h, w, 3), or such arrays; InputError for what is no image."""
        if value is None:
            return None
        if self.is_column(value):
            return [self.check(name, each) for each in value]
        (image,) = image_list(value, name, 3)
        return np.asarray(to_pil(image, "RGB", name))


IMAGE_OPTION = ImageOption(Any, None, -np.inf, np.inf)
