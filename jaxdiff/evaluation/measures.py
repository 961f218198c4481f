"""Measures of saturation and variety that need nothing but the images."""

import numpy as np

from jaxdiff.core.types import NDArray, UInt8

CLIPPED_RANGE = (2, 253)  # channel values at or beyond these count as clipped
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # weights of red, green and blue


def clipped_fraction(images: UInt8[NDArray, "n h w 3"]) -> float:
    """The fraction of channel values at an end of their range, which includes pure white."""
    low, high = CLIPPED_RANGE
    return float(np.mean((images <= low) | (images >= high)))


def chroma(images: UInt8[NDArray, "n h w 3"]) -> float:
    """The mean over pixels of (largest - smallest channel) / 255."""
    return float(np.mean(images.max(-1).astype(np.float64) - images.min(-1)) / 255)


def contrast(images: UInt8[NDArray, "n h w 3"]) -> float:
    """The standard deviation of the luminance (Rec. 709) of an image, averaged over images."""
    return float(np.mean(np.std(images / 255 @ LUMINANCE, axis=(1, 2))))


def pairwise_distance(images: UInt8[NDArray, "k h w 3"]) -> float:
    """The mean root-mean-square difference, on a scale of 0 to 1, over all pairs of images."""
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    rows, columns = np.triu_indices(len(flat), k=1)
    return float(np.sqrt(np.mean((flat[rows] - flat[columns]) ** 2, axis=1)).mean())


# The names are stored in the files of reports and sweeps.
MEASURES = {"chroma": chroma, "clipped": clipped_fraction, "contrast": contrast}
