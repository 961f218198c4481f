"""From prompts to images: conditioning, guided sampling, decoding."""
