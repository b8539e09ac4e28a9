"""Compares drafting with the public EAGLE-3 definition, written in torch (`pip install torch==2.13.0`).

Both decode the same questions greedily in float32. Torch reads the drafter's files itself, uses features and text from
transformers, and recomputes every draft from the whole text. Draft tokens must be equal, and tau equal within 1 %.
"""

import dataclasses
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ppow_jax import cli
from ppow_jax.flags import check_fields, field, require

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of this program."""

    target: str = field("smollm2-135m", "Target: a name, a .gguf file, a directory or a hub name.")
    drafter: str = field("auto", "Directory of a plain drafter in the flat format. auto: drafters/TARGET.")
    window: int = field(4, "Drafted tokens per round.", low=1, high=16)
    num_prompts: int = field(10, "Number of questions.", low=1)
    max_new_tokens: int = field(48, "Tokens of each answer.", low=2)

    def __post_init__(self):
        check_fields(self)
        found = importlib.util.find_spec("torch") is not None
        require(found, "experiments.drafter_parity compares with torch: pip install torch==2.13.0")


def main(settings: Settings) -> int:
    """Prints a row per question and one for all; 1 if something differs."""
    from ppow_jax.weights.loading import find_drafter

    directory = find_drafter(settings.drafter, settings.target)
    require(directory is not None, f"--drafter={settings.drafter}: there is none for this target; name a directory")
    rows = [
        row(*compared)
        for compared in compare(
            settings.target, directory, settings.window, settings.max_new_tokens, settings.num_prompts
        )
    ]
    total: dict[str, Any] = {"question": "all", "text_identical": all(x["text_identical"] for x in rows)}
    total |= {key: sum(x[key] for x in rows) for key in ("drafts", "same", "gained", "rounds", "torch_rounds")}
    rows.append(total)
    for x in rows:
        x |= {"tau": x["gained"] / x["rounds"], "torch_tau": x["gained"] / x["torch_rounds"]}
    print(tabulate(rows, headers="keys", floatfmt=".4f"))
    near = abs(total["tau"] / total["torch_tau"] - 1) <= 0.01
    return int(not (near and total["text_identical"] and total["same"] == total["drafts"]))


def compare(
    target: str, directory: Path, window: int, max_new_tokens: int, number: int
) -> Iterator[tuple[str, dict[str, Any], bool, list[list[int]]]]:
    """Yields, for each question: its text, our rounds, whether the greedy text is torch's, torch's drafts per round.

    Raises UserError for a drafter that the torch definition does not cover.
    """
    from experiments import eagle3_torch
    from ppow_jax import load
    from ppow_jax.evaluation.torch_parity import questions, torch_model
    from ppow_jax.weights import targets
    from ppow_jax.weights.drafters import import_drafter

    stored = import_drafter(directory)
    extras = ("fc_norm", "norm_output", "norm_before_fc", "attention_bias", "own_embed", "rope_scaling")
    found = [name for name in extras if getattr(stored.config, name)] + [stored.format] * (stored.format != "flat")
    require(not found, f"--drafter={directory}: must be a plain drafter in the flat format, this one has {found}")
    model = load(target, drafter=str(directory), dtype="float32")
    drafter = eagle3_torch.read(directory)
    plain = targets.load(target, "float32")  # the model's own layers are stacked, except on a CPU
    with torch_model(plain.config, plain.params) as theirs:
        for question in questions(number):
            ours = our_rounds(model, question, window, max_new_tokens)
            text, start = ours["prompt"] + ours["answer"], len(ours["prompt"]) + 1
            greedy, rounds = torch_rounds(theirs, drafter, text, start, window)
            yield question, ours, greedy[start - 2 : -1] == text[start - 1 :], rounds
            log.info("%s: done", question)


def our_rounds(model: Any, question: str, window: int, max_new_tokens: int) -> dict[str, Any]:
    """{prompt, answer, rounds}: token ids; per round, the tokens drafted."""
    from ppow_jax.data.conversations import Message
    from ppow_jax.data.encoding import encode_prompt
    from ppow_jax.inference import trace
    from ppow_jax.speculation.settings import chain

    prompt = encode_prompt(model.target.tokenizer, [Message("user", question)])
    made = trace.record(model, prompt.tolist(), speculation=chain(window), max_new_tokens=max_new_tokens)
    rounds = [[token.token for token in step.drafted] for step in made.steps]
    return {"prompt": prompt.tolist(), "answer": list(map(int, made.result.token_ids)), "rounds": rounds}


def torch_rounds(
    model: Any, drafter: tuple, text: list[int], start: int, window: int
) -> tuple[list[int], list[list[int]]]:
    """(the token that the target holds most probable after each of the text, the tokens that each round drafts)."""
    import torch

    from experiments.eagle3_torch import chain_rounds

    eagle3, ids_W, layers = drafter
    with torch.inference_mode():
        out = model(torch.tensor([text]), output_hidden_states=True)
        features = torch.cat([out.hidden_states[i][0] for i in layers], -1)
        embed = model.get_input_embeddings().weight
        return out.logits[0].argmax(-1).tolist(), chain_rounds(eagle3, ids_W, features, embed, text, start, window)


def row(question: str, ours: dict[str, Any], text_identical: bool, rounds: list[list[int]]) -> dict[str, Any]:
    """One line of the result table."""
    drafts = [token for drafted in ours["rounds"] for token in drafted]
    theirs = [token for drafted in rounds for token in drafted]
    same = sum(a == b for a, b in zip(drafts, theirs, strict=False))
    return {
        "question": question[:40],
        "text_identical": text_identical,
        "drafts": max(len(drafts), len(theirs)),
        "same": same,
        "gained": len(ours["answer"]) - 1,
        "rounds": len(ours["rounds"]),
        "torch_rounds": len(rounds),
    }


if __name__ == "__main__":
    cli.run(main, Settings)
