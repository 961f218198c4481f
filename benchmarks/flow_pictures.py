"""Draws the figures of docs/flow-matching.md and prints its tables.

    python benchmarks/flow_pictures.py --output docs/flow

The data are points in the plane, a mixture of four Gaussians in two classes, whose exact velocity
is known: what the figures show is flow matching itself, without the errors of a network.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from jaxdiff.diffusion.denoising import target
from jaxdiff.diffusion.grids import HostTimestepGrid, TimestepGrid
from jaxdiff.diffusion.schedules import FlowSchedule
from jaxdiff.guidance.base import RULES, GuidanceScales
from jaxdiff.guidance.denoiser import guided_denoiser, stack_streams
from jaxdiff.samplers.base import get_sampler, per_sample_keys
from jaxdiff.samplers.sampling import sample

FLOW = FlowSchedule(time_scale=1.0)
# Modes, of one standard deviation. The first two are class A, and the second of them has
# neighbours of class B.
MEANS = np.array([[-1.6, 0.8], [0.5, 0.9], [1.5, 0.4], [0.4, -1.2]])
STD = 0.35
WHOLE, CLASS_A = np.full(4, 0.25), np.array([0.5, 0.5, 0.0, 0.0])
SCALES = (0.0, 1.0, 2.0, 4.0)
SAMPLERS = {"ODE": "euler", "SDE, k = 1": "flow-sde:k=1", "SDE, k = 4": "flow-sde:k=4"}
BLUE, ORANGE, GREY = "#1f6fb4", "#d9822b", "#9a9a9a"


def network(weights, x, s, conditioning):
    """The exact velocity eps - x0 of the mixture whose modes have the weights `conditioning`."""
    alpha, sigma = (level[:, None] for level in FLOW.alpha_sigma(s))
    spread = alpha**2 * STD**2 + sigma**2
    off = x[:, None] - alpha[..., None] * MEANS
    log_p = jnp.log(conditioning) - jnp.sum(off**2, -1) / (2 * spread)
    posterior = MEANS + (alpha * STD**2 / spread)[..., None] * off
    D = jnp.sum(jax.nn.softmax(log_p)[..., None] * posterior, axis=1)
    return target("flow_prediction", D, (x - alpha * D) / sigma, alpha, sigma)


@functools.partial(jax.jit, static_argnames=("sampler", "steps"))
def generate(x, keys, w, sampler, steps, stop):
    """Where x stands after `stop` of `steps` steps from noise, guided towards class A by w."""
    rows = [jnp.tile(jnp.asarray(each, jnp.float32), (len(x), 1)) for each in (WHOLE, CLASS_A)]
    denoise = guided_denoiser(
        network,
        (),
        stack_streams(*rows),
        GuidanceScales(jnp.full(len(x), w)),
        rule=RULES["cfg"],
        prediction_type="flow_prediction",
    )
    s = np.linspace(1, 0, steps + 1)
    grid = TimestepGrid.from_host(HostTimestepGrid(s, *FLOW.alpha_sigma(s), 1.0))
    grid = grid._replace(last=jnp.asarray(stop, jnp.int32)[None])
    return sample(denoise, x, grid, keys, sampler=get_sampler(sampler))


def log_density(points, weights):
    """The logarithm of the density of the data."""
    square = np.sum((points[..., None, :] - MEANS) ** 2, -1)
    each = weights * np.exp(-square / (2 * STD**2)) / (2 * np.pi * STD**2)
    return np.log(np.sum(each, -1) + 1e-300)


def noise(count, seed):
    """The start of `count` points, and their keys."""
    return jax.random.normal(jax.random.key(seed), (count, 2)), per_sample_keys(range(count))


def panel(axes, title, limit=3.2):
    """A square panel without ticks."""
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)


def contours(axes, weights, colour):
    """Where the data are dense."""
    line = np.linspace(-4, 4, 200)
    points = np.stack(np.meshgrid(line, line), -1)
    levels = np.log([0.02, 0.2]) + np.log(weights.max() / (2 * np.pi * STD**2))
    axes.contour(
        line,
        line,
        log_density(points, weights),
        levels,
        colors=colour,
        linestyles="solid",
        linewidths=0.8,
    )


def draw_paths(output, steps=100, shown=24):
    """Straight paths of training, the velocity that is their mean, and paths of sampling."""
    figure, row = plt.subplots(1, 4, figsize=(12.4, 3.9), constrained_layout=True)
    rng = np.random.default_rng(2)
    x0 = MEANS[rng.integers(0, 4, shown)] + STD * rng.normal(size=(shown, 2))
    eps = rng.normal(size=(shown, 2))
    panel(row[0], "training: straight paths from\nnoise (grey) to data (blue)")
    for start, end in zip(eps, x0, strict=True):
        row[0].plot(*zip(start, end, strict=True), color=GREY, lw=0.7)
    row[0].scatter(*eps.T, s=8, color="0.4")
    row[0].scatter(*x0.T, s=8, color=BLUE)

    s = 0.5
    line = np.linspace(-2.6, 2.6, 13)
    points = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    whole = jnp.tile(jnp.asarray(WHOLE, jnp.float32), (len(points), 1))
    velocity = network((), jnp.asarray(points, jnp.float32), jnp.full(len(points), s), whole)
    panel(row[1], "their mean velocity -v at s = 0.5,\nwhat the network learns")
    contours(row[1], WHOLE, BLUE)
    row[1].quiver(*points.T, *-np.asarray(velocity).T, color="0.3", scale=40, width=0.005)

    x, keys = noise(shown, seed=5)
    for axes, (title, name, colour) in zip(
        row[2:],
        [
            ("the ODE: one path from each noise", "euler", BLUE),
            ("the SDE, k = 1: noise on the way", "flow-sde:k=1", ORANGE),
        ],
        strict=True,
    ):
        path = [generate(x, keys, 0.0, name, steps, stop) for stop in range(0, steps + 1, 4)]
        path = np.stack([np.asarray(each) for each in path])
        panel(axes, f"sampling by\n{title}")
        contours(axes, WHOLE, BLUE)
        axes.plot(path[..., 0], path[..., 1], color=colour, lw=0.6, alpha=0.7)
        axes.scatter(*path[0].T, s=8, color="0.4")
        axes.scatter(*path[-1].T, s=8, color=colour)
    figure.savefig(output / "paths.png", dpi=100)


def measures(x):
    """Of samples: those at the mode beside class B, and around the other mode their place."""
    near = np.linalg.norm(x[:, None] - MEANS, axis=-1).argmin(1)
    left = x[near == 0]
    shift = left.mean(0) - MEANS[0]
    spread = np.sqrt(np.mean(np.var(left, axis=0)))
    return np.mean(near == 1), np.mean(near >= 2), np.linalg.norm(shift), spread


def tilted(w):
    """The measures of p(x | A)^w p(x)^(1 - w), on a grid."""
    line = np.linspace(-5, 5, 801)
    points = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    log_p = w * log_density(points, CLASS_A) + (1 - w) * log_density(points, WHOLE)
    p = np.exp(log_p - log_p.max())
    rng = np.random.default_rng(0)
    chosen = points[rng.choice(len(points), 100_000, p=p / p.sum())]
    return measures(chosen)


def draw_guidance(output, count, steps):
    """Samples at several scales, by the ODE and SDEs; the lines of a table."""
    x, keys = noise(count, seed=9)
    shape = (len(SAMPLERS), len(SCALES))
    figure, rows = plt.subplots(*shape, figsize=(10, 7.8), constrained_layout=True)
    lines = []
    for row, (label, name) in zip(rows, SAMPLERS.items(), strict=True):
        for axes, w in zip(row, SCALES, strict=True):
            end = np.asarray(generate(x, keys, w, name, steps, steps))
            colour = BLUE if label == "ODE" else ORANGE
            panel(axes, f"{label}, w = {w:g}")
            axes.scatter(*end[:2000].T, s=1.2, color=colour, alpha=0.5, linewidths=0)
            contours(axes, WHOLE, GREY)
            contours(axes, CLASS_A, "black")
            lines.append((w, label, *measures(end)))
    figure.savefig(output / "guidance.png", dpi=100)
    lines += [(w, "p(x \\| A)^w p(x)^(1 - w)", *tilted(w)) for w in SCALES if w >= 1]
    return sorted(lines, key=lambda line: line[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the figures")
    parser.add_argument("--samples", type=int, default=8000, help="points of each table line")
    parser.add_argument("--steps", type=int, default=200, help="steps of the samplers")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    draw_paths(options.output)
    print("| w | sampled by | at A's mode beside B | at B | shift of A's other mode | its std |")
    print("|---|---|---|---|---|---|")
    for w, label, beside, wrong, shift, spread in draw_guidance(
        options.output, options.samples, options.steps
    ):
        print(f"| {w:g} | {label} | {beside:.3f} | {wrong:.3f} | {shift:.2f} | {spread:.2f} |")


if __name__ == "__main__":
    main()
