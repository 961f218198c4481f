"""Single files against the converters of diffusers, where these take small networks."""

import diffusers.loaders.single_file_utils as theirs
