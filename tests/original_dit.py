"""The forward pass of DiT's own code (2212.09748) in NumPy and float64, by the names of its files.

SiT's (2401.08740) is the same, at times from 0 to 1.
"""

import itertools

import numpy as np

EPS = 1e-6


def network(tensors, x, t, labels, *, heads):
    """All channels (b, h, w, 2c) of the output for latents x (b, h, w, c)."""
    w = {name: np.asarray(values, np.float64) for name, values in tensors.items()}
    kernel = w["x_embedder.proj.weight"]
    patch, (b, height, width, channels) = kernel.shape[-1], x.shape
    grid = height // patch, width // patch
    patches = x.astype(np.float64).reshape(b, grid[0], patch, grid[1], patch, channels)
    tokens = np.einsum("bipjqc,dcpq->bijd", patches, kernel) + w["x_embedder.proj.bias"]
    tokens = tokens.reshape(b, -1, kernel.shape[0]) + w["pos_embed"]

    def linear(name, values):
        return values @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def modulated(values, shift, scale):
        centred = values - values.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
        return normed * (1 + scale[:, None]) + shift[:, None]

    def attention(name, values):
        q, k, v = np.moveaxis(
            linear(f"{name}.qkv", values).reshape(b, -1, 3, heads, kernel.shape[0] // heads), 2, 0
        )
        scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("bhnm,bmhd->bnhd", shares, v)
        return linear(f"{name}.proj", mixed.reshape(b, -1, kernel.shape[0]))

    angles = np.asarray(t, np.float64)[:, None] * 10000.0 ** (-np.arange(128) / 128)
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    vector = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
    vector = silu(vector + w["y_embedder.embedding_table.weight"][labels])
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for block in (f"blocks.{i}" for i in range(depth)):
        parts = np.split(linear(f"{block}.adaLN_modulation.1", vector), 6, axis=1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        attended = attention(f"{block}.attn", modulated(tokens, shift, scale))
        tokens = tokens + gate[:, None] * attended
        hidden = gelu(linear(f"{block}.mlp.fc1", modulated(tokens, mlp_shift, mlp_scale)))
        tokens = tokens + mlp_gate[:, None] * linear(f"{block}.mlp.fc2", hidden)
    ends = np.split(linear("final_layer.adaLN_modulation.1", vector), 2, axis=1)
    out = linear("final_layer.linear", modulated(tokens, *ends))
    out = out.reshape(b, *grid, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return out.reshape(b, height, width, -1)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    """The approximation by tanh."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def velocity(tensors, x, tau, labels, scale, *, null, heads):
    """SiT's guided velocity at its time tau, from noise, 0, to data, 1; 3 channels are guided."""
    c = x.shape[-1]

    def out(own):
        times = np.full(len(x), tau)
        return network(tensors, x, times, np.array(own), heads=heads)[..., :c]

    cond, uncond = out(labels), out([null] * len(x))
    guided = uncond + scale * (cond - uncond)
    return np.concatenate([guided[..., :3], cond[..., 3:]], axis=-1)


def ode(tensors, noise, times, labels, scale, **options):
    """Euler's method for dx = u dtau through rising `times`, from noise at 0."""
    x = noise.astype(np.float64)
    for tau, after in itertools.pairwise(times):
        x = x + (after - tau) * velocity(tensors, x, tau, labels, scale, **options)
    return x
