"""The EAGLE-3 drafter in torch, written from its description alone: the reference that drafting is compared with.

Nothing is cached and nothing is batched: a drafter's answer is that of its layers over the whole list of pairs
(feature, embedding of the next token), each pair seeing itself and the earlier ones.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.models.rope import Linear


class Eagle3:
    """A drafter with parameters as in `drafter_config.parameter_shapes`."""

    def __init__(self, config: DrafterConfig, params: dict):
        self.config = config
        self.w = {name: torch.tensor(np.asarray(value, np.float32)) for name, value in params.items()}

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """[..., 3 D] -> [..., E]."""
        if self.config.fc_norm:
            three = features.split(self.config.target_hidden_size, -1)
            features = torch.cat([self.norm(x, w) for x, w in zip(three, self.w["fc_norm"], strict=True)], -1)
        if self.config.norm_before_fc:
            features = self.norm(features, self.w["fc_norm"])
        return features @ self.w["fc"].T

    def outputs(self, g: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Features and embeddings of n pairs, [n, E] each -> outputs of the last layer, [n, E], before the norm."""
        w = self.w
        normed = self.norm(g, w["hidden_norm"])
        x = normed if self.config.norm_before_residual else g
        a = torch.cat([self.norm(e, w["input_norm"]), normed], -1)
        for n in range(self.config.num_layers):
            layer = w if n == 0 else {k.removeprefix(f"layers.{n}."): v for k, v in w.items()}
            a = a if n == 0 else self.norm(x, layer["input_norm"])
            x = x + self.attention(layer, a)
            h = self.norm(x, layer["post_norm"])
            gate, up = h @ layer["gate_proj"].T, h @ layer["up_proj"].T
            x = x + (gate * torch.sigmoid(gate) * up) @ layer["down_proj"].T
        return x

    def attention(self, w: dict, a: torch.Tensor) -> torch.Tensor:
        """Causal attention of one layer over its inputs [n, .] -> [n, E]."""
        heads, kv_heads, d, n = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim, len(a)
        q, k, v = (
            (a @ w[f"{x}_proj"].T + w.get(f"{x}_bias", torch.zeros(()))).view(n, -1, d).transpose(0, 1) for x in "qkv"
        )
        if self.config.qk_norm:
            q, k = self.norm(q, w["q_norm"]), self.norm(k, w["k_norm"])
        q, k = self.rotate(q), self.rotate(k).repeat_interleave(heads // kv_heads, 0)
        later = torch.ones(n, n).triu(1).bool()
        weights = (q @ k.transpose(1, 2) / d**0.5).masked_fill(later, -torch.inf).softmax(-1)
        out = weights @ v.repeat_interleave(heads // kv_heads, 0)
        return out.transpose(0, 1).reshape(n, -1) @ w["o_proj"].T + w.get("o_bias", torch.zeros(()))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """[heads, n, d]: (x_k, x_{k + d/2}) is a complex number that turns with the position."""
        n, d = x.shape[1:]
        z = torch.complex(x[..., : d // 2], x[..., d // 2 :])
        speed = self.config.rope_theta ** (-torch.arange(d // 2) * 2.0 / d)
        if isinstance(self.config.rope_scaling, Linear):  # positions lie closer together
            speed = speed / self.config.rope_scaling.factor
        z = z * torch.polar(torch.ones(()), torch.arange(n)[:, None] * speed)
        return torch.cat([z.real, z.imag], -1)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Root-mean-square norm."""
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps) * weight

    def feed(self, out: torch.Tensor) -> torch.Tensor:
        """The input of the next step in place of a feature."""
        return self.norm(out, self.w["norm"]) if self.config.norm_output else out

    def logits(self, out: torch.Tensor) -> torch.Tensor:
        """Logits [..., W] over the draft vocabulary."""
        return self.norm(out, self.w["norm"]) @ self.w["lm_head"].T


def eagle3(
    config: DrafterConfig, params: dict, features_BxTxF: np.ndarray, embed_SxBxTxE: np.ndarray
) -> dict[str, np.ndarray]:
    """The values of S steps from every anchor: g, and per step outputs and logits.

    Anchor i has seen (feature j, embedding of token j + 1) for j <= i. Step s > 0 appends the pair (output of step
    s - 1, embedding of the token drafted there).
    """
    drafter, embed = Eagle3(config, params), torch.tensor(embed_SxBxTxE)
    g = drafter.fuse(torch.tensor(features_BxTxF))
    S, B, T, E = embed.shape
    out = torch.zeros(S, B, T, E)
    for b in range(B):
        for i in range(T):
            gs, es = g[b, : i + 1], embed[0, b, : i + 1]
            for s in range(S):
                out[s, b, i] = drafter.outputs(gs, es)[-1]
                if s + 1 < S:
                    gs = torch.cat([gs, drafter.feed(out[s, b, i])[None]])
                    es = torch.cat([es, embed[s + 1, b, i][None]])
    return {"g": g.numpy(), "out": out.numpy(), "logits": drafter.logits(out).numpy()}


_FILE_NAMES = {  # of the flat format, in the order of the drafter's description
    "fc.weight": "fc",
    "input_layernorm.weight": "input_norm",
    "hidden_norm.weight": "hidden_norm",
    "self_attn.q_proj.weight": "q_proj",
    "self_attn.k_proj.weight": "k_proj",
    "self_attn.v_proj.weight": "v_proj",
    "self_attn.o_proj.weight": "o_proj",
    "post_attention_layernorm.weight": "post_norm",
    "mlp.gate_proj.weight": "gate_proj",
    "mlp.up_proj.weight": "up_proj",
    "mlp.down_proj.weight": "down_proj",
    "norm.weight": "norm",
    "lm_head.weight": "lm_head",
}


def read(directory: Path) -> tuple[Eagle3, torch.Tensor, list[int]]:
    """(drafter, target id of each draft id, indices of the target's `hidden_states` that it sees) of a plain drafter.

    Read from the files in the way that public loaders of the flat format read them, without this project's own.
    """
    said = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    outputs_of = said["eagle_config"]["eagle_aux_hidden_state_layer_ids"]  # hidden_states[0] is the embedding
    ids_W = tensors.pop("d2t") + torch.arange(said["draft_vocab_size"])
    assert torch.equal(tensors.pop("t2d").nonzero()[:, 0], ids_W)
    config = DrafterConfig(
        vocab_size=said["vocab_size"],
        draft_vocab_size=said["draft_vocab_size"],
        hidden_size=said["hidden_size"],
        intermediate_size=said["intermediate_size"],
        num_heads=said["num_attention_heads"],
        num_kv_heads=said["num_key_value_heads"],
        head_dim=said["head_dim"],
        rms_norm_eps=said["rms_norm_eps"],
        rope_theta=said["rope_theta"],
        max_position_embeddings=said["max_position_embeddings"],
        target_hidden_size=said["hidden_size"],
        feature_layers=tuple(i + 1 for i in outputs_of),
        fc_norm=False,
        norm_before_residual=said["norm_before_residual"],
    )
    params = {_FILE_NAMES[name.removeprefix("midlayer.")]: value.float().numpy() for name, value in tensors.items()}
    return Eagle3(config, params), ids_W, [i + 1 for i in outputs_of]


def chain_rounds(
    drafter: Eagle3,
    ids_W: torch.Tensor,
    features: torch.Tensor,
    embed: torch.Tensor,
    text: list[int],
    start: int,
    K: int,
) -> list[list[int]]:
    """Greedy chain drafting along a text that the target wrote greedily: the K tokens that each round drafts.

    features [T, 3 D]: the target's; embed [V, E]; start: of text, where the first round begins. A round gains the
    leading tokens that are the text's, and the target's own one.
    """
    g, n, rounds = drafter.fuse(features), start, []
    while n < len(text):
        gs, es, drafted = g[: n - 1], embed[text[1:n]], []
        for _ in range(K):
            out = drafter.outputs(gs, es)[-1]
            drafted.append(int(ids_W[drafter.logits(out).argmax()]))
            gs, es = torch.cat([gs, drafter.feed(out)[None]]), torch.cat([es, embed[drafted[-1]][None]])
        rounds.append(drafted)
        right = [a == b for a, b in zip(drafted, text[n:], strict=False)]
        n += 1 + (right.index(False) if False in right else len(right))
    return rounds
