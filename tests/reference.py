"""A slow, obvious forward pass of Baichuan-M1, the oracle of m1local/model.py.

What it is: the published description in NumPy float64, one token, head and key at a time, without
cache, chunks, masks or batches. What it is not: built on m1local; it shares no line with the code
it checks, so one misreading cannot hide in both.
Source: the published modeling code and arXiv 2502.12671; checked by tests/golden.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, NDArray[np.floating[Any]]]


def reference_logits(
    config: Mapping[str, Any], weights: Weights, token_ids: Sequence[int]
) -> Array:
    """Next-token logits (T, V) of `token_ids`; `weights` as the vendor stores them.

    The rows of lm_head.weight may have any length: NormHead divides by it here.
    """
    wide = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    eps = config["rms_norm_eps"]
    x = wide["model.embed_tokens.weight"][list(token_ids)]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        h = rms_norm(x, wide[block + "input_layernorm.weight"], eps)
        x = x + attention(config, layer, h, wide)
        h = rms_norm(x, wide[block + "post_attention_layernorm.weight"], eps)
        gate = h @ wide[block + "mlp.gate_proj.weight"].T
        up = h @ wide[block + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ wide[block + "mlp.down_proj.weight"].T
    head = wide["lm_head.weight"]
    head = head / np.sqrt((head**2).sum(axis=1, keepdims=True))
    logits: Array = rms_norm(x, wide["model.norm.weight"], eps) @ head.T
    return logits


def attention(
    config: Mapping[str, Any], layer: int, h: Array, weights: Mapping[str, Array]
) -> Array:
    """What one layer's attention adds to the residual stream: (T, C) -> (T, C)."""
    slides = layer in config["sliding_window_layers"]
    kind = "swa_" if slides else ""
    num_heads = config[f"num_{kind}attention_heads"]
    num_kv_heads = config[f"num_{kind}key_value_heads"]
    head_dim = config["hidden_size"] // num_heads
    kv_size = num_kv_heads * head_dim
    name = f"model.layers.{layer}.self_attn."

    length = len(h)
    packed = h @ weights[name + "W_pack.weight"].T
    q: Array = packed[:, : num_heads * head_dim].reshape(length, num_heads, head_dim)
    k: Array = packed[:, -2 * kv_size : -kv_size].reshape(length, num_kv_heads, head_dim)
    v: Array = packed[:, -kv_size:].reshape(length, num_kv_heads, head_dim)

    k = rope(convolve(k, weights[name + "conv_k"]), config["rope_theta"])
    v = convolve(v, weights[name + "conv_v"])
    q = rope(q, config["rope_theta"])

    mixed = np.zeros((length, num_heads, head_dim))
    for t in range(length):
        visible = [
            j for j in range(t + 1) if not slides or t - j < config["sliding_window"]
        ]  # the token itself counts as one of the window
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = np.array([q[t, head] @ k[j, kv_head] for j in visible]) / np.sqrt(head_dim)
            probabilities = np.exp(scores - scores.max())
            probabilities /= probabilities.sum()
            for probability, j in zip(probabilities, visible, strict=True):
                mixed[t, head] += probability * v[j, kv_head]
    added: Array = mixed.reshape(length, -1) @ weights[name + "o_proj.weight"].T
    return added


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Divide each row of (T, C) by its root mean square, then scale by `weight` (C,)."""
    normed: Array = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * weight
    return normed


def convolve(raw: Array, taps: Array) -> Array:
    """taps[0] * previous token + taps[1] * this token, per kv head: (T, Hkv, D) -> the same."""
    mixed = np.zeros_like(raw)
    for t in range(raw.shape[0]):
        for head in range(raw.shape[1]):
            before, now = taps[0, 0, head, 0]
            mixed[t, head] = now * raw[t, head]
            if t > 0:
                mixed[t, head] += before * raw[t - 1, head]
    return mixed


def rope(x: Array, theta: float) -> Array:
    """Turn column j together with column j + D/2 by the angle t * theta^(-2j/D): (T, heads, D)."""
    length, _, head_dim = x.shape
    turned = np.zeros_like(x)
    for t in range(length):
        for j in range(head_dim // 2):
            angle = t * theta ** (-2 * j / head_dim)
            low, high = x[t, :, j], x[t, :, j + head_dim // 2]
            turned[t, :, j] = low * np.cos(angle) - high * np.sin(angle)
            turned[t, :, j + head_dim // 2] = high * np.cos(angle) + low * np.sin(angle)
    return turned
