"""The released models' forward in plain PyTorch, straight from their tensors: what the converted ones must compute.

It shares no code with the models under test, nor with transformers: attention is written out, and a Mamba layer is a
recurrence over tokens. Sizes and names are those of ``released_layouts``. Everything runs in the tensors' own dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from released_layouts import CONV_KERNEL, IMAGE_TOKEN, MAMBA_LAYERS, ROTARY_SHARE, TEXT, VISION
from torch import Tensor

Weights = dict[str, Tensor]
TOWER = "vision_tower._vision_tower.vision_model"
DECODER = "language_model.model"


def logits(weights: Weights, ids: Tensor, pixels: Tensor, student: bool) -> Tensor:
    """[L, rows] for the token ids [L], whose image tokens stand for ``pixels`` [3, S, S]."""
    x = weights[f"{DECODER}.embed_tokens.weight"][ids]
    x[ids == IMAGE_TOKEN] = connector(weights, tower(weights, pixels))
    for layer in range(TEXT["layers"]):
        at = f"{DECODER}.layers.{layer}"
        h = norm(weights, f"{at}.input_layernorm", x, 1e-5)
        if student and layer in MAMBA_LAYERS:
            mixed = mamba(weights, f"{at}.mamba", h)
        else:
            mixed = attention(weights, f"{at}.self_attn", h)
        mlp = linear(weights, f"{at}.mlp.fc2", F.gelu(linear(weights, f"{at}.mlp.fc1", h), approximate="tanh"))
        x = x + mixed + mlp
    return linear(weights, "language_model.lm_head", norm(weights, f"{DECODER}.final_layernorm", x, 1e-5))


def tower(weights: Weights, pixels: Tensor) -> Tensor:
    """[3, S, S] -> [patches - 1, width]: the last layer but one, without its first patch."""
    embeddings, patch, heads = f"{TOWER}.embeddings", VISION["patch"], VISION["heads"]
    count = VISION["image"] // patch
    patches = pixels.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4).reshape(count**2, -1)
    x = patches @ weights[f"{embeddings}.patch_embedding.weight"].flatten(1).T
    x = x + weights[f"{embeddings}.patch_embedding.bias"] + weights[f"{embeddings}.position_embedding.weight"]
    for layer in range(VISION["layers"] - 1):
        at = f"{TOWER}.encoder.layers.{layer}"
        h = norm(weights, f"{at}.layer_norm1", x, 1e-6)
        q, k, v = (linear(weights, f"{at}.self_attn.{name}_proj", h).unflatten(-1, (heads, -1)) for name in "qkv")
        weight = (torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + linear(weights, f"{at}.self_attn.out_proj", torch.einsum("hij,jhd->ihd", weight, v).flatten(1))
        h = norm(weights, f"{at}.layer_norm2", x, 1e-6)
        x = x + linear(weights, f"{at}.mlp.fc2", F.gelu(linear(weights, f"{at}.mlp.fc1", h), approximate="tanh"))
    return x[1:]


def connector(weights: Weights, features: Tensor) -> Tensor:
    return linear(weights, "connector._connector.2", F.gelu(linear(weights, "connector._connector.0", features)))


def attention(weights: Weights, at: str, h: Tensor) -> Tensor:
    """Causal, with the first part of each head rotated by its position."""
    heads, length = TEXT["heads"], h.shape[0]
    width = TEXT["hidden"] // heads
    q, k, v = (linear(weights, f"{at}.{name}_proj", h).unflatten(-1, (-1, width)) for name in "qkv")
    q, k = rotated(q), rotated(k)
    k, v = (heads_of.repeat_interleave(heads // heads_of.shape[1], dim=1) for heads_of in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(width)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    return linear(weights, f"{at}.dense", torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1))


def rotated(heads: Tensor) -> Tensor:
    """[L, H, d]: channel i of the rotated part turns with channel i + half of it."""
    part = int(heads.shape[-1] * ROTARY_SHARE)
    half = part // 2
    turned = heads.clone()
    for i in range(half):
        angle = torch.arange(heads.shape[0], dtype=heads.dtype) * 10000 ** (-2 * i / part)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        turned[..., i] = heads[..., i] * cos - heads[..., i + half] * sin
        turned[..., i + half] = heads[..., i + half] * cos + heads[..., i] * sin
    return turned


def mamba(weights: Weights, at: str, h: Tensor) -> Tensor:
    """Mamba-2 as MaTVLM released it, token by token: [L, W] -> [L, W]."""
    heads, inner = TEXT["heads"], TEXT["hidden"]
    width = inner // heads
    kernel = weights[f"{at}.conv1d.weight"][:, 0]
    kv = (kernel.shape[0] - inner) // 2
    state = h.new_zeros(heads, width, width)
    window = h.new_zeros(CONV_KERNEL, kernel.shape[0])
    outputs = []
    for token in linear(weights, f"{at}.in_proj", h):
        z, xBC, dt = token.split([inner, kernel.shape[0], heads])
        window = torch.cat([window[1:], xBC[None]])
        xBC = F.silu((window * kernel.T).sum(0) + weights[f"{at}.conv1d.bias"])
        x, B, C = (part.unflatten(-1, (-1, width)) for part in xBC.split([kv, kv, inner]))
        x, B = (part.repeat_interleave(heads // part.shape[0], dim=0) for part in (x, B))
        dt = F.softplus(dt + weights[f"{at}.dt_bias"])
        decay = torch.exp(-dt * weights[f"{at}.A_log"].exp())
        state = decay[:, None, None] * state + dt[:, None, None] * x[:, :, None] * B[:, None, :]
        y = (state * C[:, None, :]).sum(-1) + weights[f"{at}.D"][:, None] * x
        gated = y * F.silu(z).unflatten(-1, (heads, width))
        normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        outputs.append(normed.flatten() * weights[f"{at}.norm.weight"])
    return linear(weights, f"{at}.out_proj", torch.stack(outputs))


def linear(weights: Weights, at: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{at}.weight"].T
    return y + weights[f"{at}.bias"] if f"{at}.bias" in weights else y


def norm(weights: Weights, at: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{at}.weight"] + weights[f"{at}.bias"]
