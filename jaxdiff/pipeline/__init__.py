"""From a prompt to a picture: conditioning, guided sampling, decoding."""
