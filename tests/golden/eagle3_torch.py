"""The EAGLE-3 drafter in torch, written from its description alone: what the golden values are made with."""

import numpy as np
import torch

from ppow_jax.models.drafter_config import DrafterConfig


def eagle3(
    config: DrafterConfig, params: dict, features_BxTxF: np.ndarray, embed_SxBxTxE: np.ndarray
) -> dict[str, np.ndarray]:
    """EAGLE-3 by its description, one anchor at a time and nothing cached: g, and per step outputs and logits.

    Anchor i has seen (feature j, embedding of token j + 1) for j <= i. Step s > 0 appends the pair (output of step
    s - 1, embedding of the token drafted there) at position i + s, and runs the layer over all pairs.
    """
    w = {name: torch.tensor(value) for name, value in params.items()}
    features, embed = torch.tensor(features_BxTxF), torch.tensor(embed_SxBxTxE)
    heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim

    def norm(x, weight):
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    def rotate(x, position):  # [n, heads, d]: (x_k, x_{k + d/2}) is a complex number that turns with the position
        z = torch.complex(x[..., : d // 2], x[..., d // 2 :])
        speed = config.rope_theta ** (-torch.arange(d // 2) * 2.0 / d)
        z = z * torch.polar(torch.ones(()), position[:, None, None] * speed)
        return torch.cat([z.real, z.imag], -1)

    def layer(g, e):  # [n, E] each -> [E], the output at the last pair
        a = torch.cat([norm(e, w["input_norm"]), norm(g, w["hidden_norm"])], -1)
        position = torch.arange(len(a), dtype=torch.float32)
        q = rotate((a @ w["q_proj"].T).view(-1, heads, d), position)[-1]
        k = rotate((a @ w["k_proj"].T).view(-1, kv_heads, d), position).repeat_interleave(heads // kv_heads, 1)
        v = (a @ w["v_proj"].T).view(-1, kv_heads, d).repeat_interleave(heads // kv_heads, 1)
        weights = torch.softmax(torch.einsum("hd,nhd->hn", q, k) / d**0.5, -1)
        residual = norm(g, w["hidden_norm"]) if config.norm_before_residual else g
        y = residual[-1] + torch.einsum("hn,nhd->hd", weights, v).reshape(-1) @ w["o_proj"].T
        h = norm(y, w["post_norm"])
        return y + (torch.nn.functional.silu(h @ w["gate_proj"].T) * (h @ w["up_proj"].T)) @ w["down_proj"].T

    if config.fc_norm:
        three = features.split(config.target_hidden_size, -1)
        features = torch.cat([norm(x, weight) for x, weight in zip(three, w["fc_norm"], strict=True)], -1)
    g = features @ w["fc"].T
    S, B, T, E = embed.shape
    out = torch.zeros(S, B, T, E)
    for b in range(B):
        for i in range(T):
            gs, es = g[b, : i + 1], embed[0, b, : i + 1]
            for s in range(S):
                out[s, b, i] = layer(gs, es)
                fed = norm(out[s, b, i], w["norm"]) if config.fc_norm else out[s, b, i]
                if s + 1 < S:
                    gs, es = torch.cat([gs, fed[None]]), torch.cat([es, embed[s + 1, b, i][None]])
    logits = norm(out, w["norm"]) @ w["lm_head"].T
    return {"g": g.numpy(), "out": out.numpy(), "logits": logits.numpy()}
