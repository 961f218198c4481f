"""GLIDE in PyTorch, after the paper (2112.10741) and the names of the published tensors.

One network holds the UNet of guided diffusion (2105.05233, with attention over the text's states
beside the pixels) and the transformer that reads the text.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

HEAD = 64  # channels of an attention head
GROUPS = 32


class TextAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.c_qkv(x).reshape(b, n, -1, 3, HEAD).permute(3, 0, 2, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.c_proj(out.transpose(1, 2).reshape(b, n, c))


class TextMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.c_proj(functional.gelu(self.c_fc(x)))


class TextBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn, self.mlp = TextAttention(width), TextMLP(width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(width) for _ in range(layers))

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return x


class Res(nn.Module):
    """A residual block; `change` doubles or halves the resolution."""

    def __init__(self, n_in, n_out, time, change=None):
        super().__init__()
        none = nn.Identity
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, n_in), none(), nn.Conv2d(n_in, n_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * n_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, n_out), nn.SiLU(), none(), nn.Conv2d(n_out, n_out, 3, padding=1)
        )
        self.skip_connection = none() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)
        self.change = change

    def forward(self, x, time, states):
        h = functional.silu(self.in_layers[0](x))
        if self.change == "down":
            x, h = functional.avg_pool2d(x, 2), functional.avg_pool2d(h, 2)
        if self.change == "up":
            x, h = (each.repeat_interleave(2, 2).repeat_interleave(2, 3) for each in (x, h))
        h = self.in_layers[2](h)
        scale, shift = self.emb_layers(time)[..., None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[3](functional.silu(h))


class Mix(nn.Module):
    """Attention of the pixels over the text's states and themselves."""

    def __init__(self, channels, context):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.encoder_kv = nn.Conv1d(context, 2 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, time, states):
        b, c, h, w = x.shape
        own = self.qkv(self.norm(x).reshape(b, c, h * w)).reshape(b, -1, 3, HEAD, h * w)
        other = self.encoder_kv(states.transpose(1, 2))
        other = other.reshape(b, -1, 2, HEAD, states.shape[1])
        q, k, v = own.transpose(3, 4).unbind(2)
        ek, ev = other.transpose(3, 4).unbind(2)
        k, v = torch.cat([ek, k], dim=2), torch.cat([ev, v], dim=2)
        out = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, h * w)
        return x + self.proj_out(out).reshape(x.shape)


def sines(t, width):
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Glide(nn.Module):
    """`attends` says of each stage whether its blocks have attention."""

    def __init__(
        self,
        *,
        in_channels=3,
        width=192,
        multiples=(1, 2, 3, 4),
        attends=(False, True, True, True),
        layers=3,
        words=50257,
        length=128,
        text_width=512,
        text_layers=16,
    ):
        super().__init__()
        time = 4 * width
        self.width, self.in_channels, self.length, self.end = width, in_channels, length, words - 1
        self.positional_embedding = nn.Parameter(torch.empty(length, text_width))
        self.padding_embedding = nn.Parameter(torch.empty(length, text_width))
        self.token_embedding = nn.Embedding(words, text_width)
        self.transformer = TextTransformer(text_width, text_layers)
        self.final_ln = nn.LayerNorm(text_width)
        self.transformer_proj = nn.Linear(text_width, time)
        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))

        def block(n_in, n_out, mixes):
            return [Res(n_in, n_out, time), *([Mix(n_out, text_width)] if mixes else [])]

        channels, now = [width], width
        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(in_channels, width, 3, padding=1)])]
        )
        for stage, (multiple, mixes) in enumerate(zip(multiples, attends, strict=True)):
            for _ in range(layers):
                self.input_blocks.append(nn.ModuleList(block(now, multiple * width, mixes)))
                now = multiple * width
                channels.append(now)
            if stage < len(multiples) - 1:
                self.input_blocks.append(nn.ModuleList([Res(now, now, time, "down")]))
                channels.append(now)
        self.middle_block = nn.ModuleList([*block(now, now, True), Res(now, now, time)])
        self.output_blocks = nn.ModuleList()
        for stage in reversed(range(len(multiples))):
            for i in range(layers + 1):
                out = multiples[stage] * width
                made = block(now + channels.pop(), out, attends[stage])
                now = out
                if stage and i == layers:
                    made.append(Res(now, now, time, "up"))
                self.output_blocks.append(nn.ModuleList(made))
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, now), nn.Identity(), nn.Conv2d(width, 6, 3, padding=1)
        )

    def encode(self, ids):
        """States and pooled embedding of padded tokens (b, n)."""
        text = self.token_embedding(ids) + self.positional_embedding
        x = torch.where((ids != self.end)[..., None], text, self.padding_embedding)
        states = self.final_ln(self.transformer(x))
        return states, self.transformer_proj(states[:, -1])

    def forward(self, x, t, ids, image=None, mask=None, low=None):
        """The output for images x, where `image` is known where `mask` is 1, and one to enlarge."""
        parts = [x]
        if self.in_channels in (7, 10):
            image = torch.zeros_like(x) if image is None else image
            mask = torch.zeros_like(x[:, :1]) if mask is None else mask
            parts += [image * mask, mask]
        if self.in_channels in (6, 10):
            parts.append(
                functional.interpolate(low, x.shape[2:], mode="bilinear", align_corners=False)
            )
        states, pooled = self.encode(ids)
        time = self.time_embed(sines(t, self.width)) + pooled
        h = self.input_blocks[0][0](torch.cat(parts, dim=1))
        skips = [h]
        for modules in self.input_blocks[1:]:
            for module in modules:
                h = module(h, time, states)
            skips.append(h)
        for module in self.middle_block:
            h = module(h, time, states)
        for modules in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            for module in modules:
                h = module(h, time, states)
        return self.out[2](functional.silu(self.out[0](h)))


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return functional.layer_norm(x, self.g.shape, self.g, self.b)


class Affine(nn.Module):
    def __init__(self, n_in, n_out, bias=True):
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in))
        self.b = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x):
        return functional.linear(x, self.w, self.b)


class ClipAttention(nn.Module):
    def __init__(self, width, causal):
        super().__init__()
        self.ln = Norm(width)
        self.f_q, self.f_k = Affine(width, width), Affine(width, width, bias=False)
        self.f_v, self.f_c = Affine(width, width), Affine(width, width)
        self.causal = causal

    def forward(self, x):
        b, n, c = x.shape
        normed = self.ln(x)
        q, k, v = (
            f(normed).reshape(b, n, -1, HEAD).transpose(1, 2)
            for f in (self.f_q, self.f_k, self.f_v)
        )
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.f_c(out.transpose(1, 2).reshape(b, n, c))


class ClipMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln = Norm(width)
        self.f_1, self.f_2 = Affine(width, 4 * width), Affine(4 * width, width)

    def forward(self, x):
        return x + self.f_2(functional.gelu(self.f_1(self.ln(x))))


class ClipBlock(nn.Module):
    def __init__(self, width, causal):
        super().__init__()
        self.f_attn, self.f_mlp = ClipAttention(width, causal), ClipMLP(width)

    def forward(self, x):
        return self.f_mlp(self.f_attn(x))


class ClipText(nn.Module):
    def __init__(self, words, length, width):
        super().__init__()
        self.w_voc = nn.Parameter(torch.empty(words, width))
        self.w_pos = nn.Parameter(torch.empty(length, width))

    def forward(self, ids):
        return self.w_voc[ids] + self.w_pos


class ClipImage(nn.Module):
    """Images in [-1, 1], normalised as CLIP's, with a token for the timestep before their own."""

    def __init__(self, size, patch, width, steps):
        super().__init__()
        self.w_t = nn.Parameter(torch.empty(steps, width))
        self.patch_proj = nn.Parameter(torch.empty(width, 3, patch, patch))
        self.w_pos = nn.Parameter(torch.empty(1 + (size // patch) ** 2, width))
        self.ln = Norm(width)
        self.patch = patch

    def forward(self, images, t):
        mean, std = (torch.tensor(each)[:, None, None] for each in CLIP_NORM)
        pixels = ((images + 1) * 127.5 - mean) / std
        patches = functional.conv2d(pixels, self.patch_proj, stride=self.patch)
        tokens = torch.cat([self.w_t[t][:, None], patches.flatten(2).transpose(1, 2)], dim=1)
        return self.ln(tokens + self.w_pos)


CLIP_NORM = (122.77093945, 116.74601272, 104.09373519), (68.50053285, 66.63215831, 70.32316309)


class ClipOutput(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.ln, self.f = Norm(width), Affine(width, out, bias=False)

    def forward(self, x):
        return functional.normalize(self.f(self.ln(x)), dim=-1)


class ClipTower(nn.Module):
    """Unit vectors of what `start` reads, from the token at `place`."""

    def __init__(self, start, width, layers, out, causal):
        super().__init__()
        blocks = {f"block_{i}": ClipBlock(width, causal) for i in range(layers)}
        self.blocks = nn.ModuleDict({"input": start, **blocks, "output": ClipOutput(width, out)})

    def forward(self, *inputs, place=0):
        x = self.blocks["input"](*inputs)
        for name, block in self.blocks.items():
            x = block(x) if name.startswith("block_") else x
        return self.blocks["output"](x[torch.arange(len(x)), place])


def alphas_bar(kind, total=1000):
    """The products of 1 - beta: of the cosine schedule (2102.09672) or of linear betas."""
    if kind == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 0.02, total))
    curve = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - curve[1:] / curve[:-1], 0.999))


@torch.no_grad()
def sample(predict, noise, kind, steps, *, draw=None, known=None, gradient=None):
    """Images of `noise` in `steps` equal steps, by the process on the timesteps that are left.

    `predict` gives noise and the mix of two variances at images and a timestep. With `draw`, the
    noise of each step, it is ancestral sampling, without DDIM. `known` is an image, its mask, and
    the noise of its own: it replaces what is generated after each step.
    """
    left = np.round(np.linspace(0, 999, steps)).astype(int)
    bars = alphas_bar(kind)[left]
    x = noise
    for i in reversed(range(steps)):
        bar, before = float(bars[i]), float(bars[i - 1]) if i else 1.0
        eps, mix = predict(x, torch.full((len(x),), int(left[i]))).chunk(2, dim=1)
        clean = ((x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)).clamp(-1, 1)
        beta = 1 - bar / before
        if draw is None:
            eps = (x - math.sqrt(bar) * clean) / math.sqrt(1 - bar)
            x = math.sqrt(before) * clean + math.sqrt(1 - before) * eps
        else:
            mean = (
                math.sqrt(before) * beta / (1 - bar) * clean
                + math.sqrt(1 - beta) * (1 - before) / (1 - bar) * x
            )
            if i:
                small = math.log(beta * (1 - before) / (1 - bar))
                logarithm = small + (mix + 1) / 2 * (math.log(beta) - small)
                if gradient is not None:
                    mean = mean + logarithm.exp() * gradient(x, int(left[i]))
                mean = mean + torch.exp(logarithm / 2) * draw(steps - 1 - i)
            x = mean
        if known is not None:
            image, mask, z = known
            x = torch.where(mask > 0, math.sqrt(before) * image + math.sqrt(1 - before) * z, x)
    return x
