"""Prompt lookup of transformers, timed against its own plain decoding on the prompts of an evaluation.

Needs torch and transformers, which this project does not. First our own side, which also writes the prompts, and the
target in Hugging Face's format:

    python -m experiments.evaluate --modes=ngram --num_prompts=8 --max_new_tokens=96 --benchmarks=... \\
        --output=ours.json --dump_outputs=ours.jsonl
    python -c "from ppow_jax.weights import huggingface, targets; t = targets.load('smollm2-135m'); \\
        huggingface.save_target('hf', t.config, t.params)"
    OTHER_PYTHON docs/tools/prompt_lookup.py hf ours.jsonl theirs.json [bfloat16 [10]]

Arguments: the target's directory, the dumped outputs, the file to write, the dtype, and the most tokens that a lookup
drafts. Decoding alone is timed, as in `experiments.evaluate`: the time of an answer of one token, which is that of
reading the prompt, is subtracted.
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers


def answer(model, prompt: torch.Tensor, count: int, **how) -> tuple[list[int], float]:
    """(new tokens, seconds) of a greedy answer of at most `count` tokens."""
    begin = time.perf_counter()
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count, **how)
    return found[0, prompt.shape[1] :].tolist(), time.perf_counter() - begin


def main(target: str, prompts: str, output: str, dtype: str = "bfloat16", tokens: str = "10") -> None:
    """Decodes every prompt plainly and with prompt lookup, in turns, and writes and prints a row per benchmark."""
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=getattr(torch, dtype)).eval()
    lines = [json.loads(line) for line in Path(prompts).read_text(encoding="utf-8").splitlines()]
    ways = {"plain": {}, "lookup": {"prompt_lookup_num_tokens": int(tokens)}}
    rows: dict[str, dict[str, float]] = {}
    for n, line in enumerate(lines):
        prompt, count = torch.tensor([line["prompt_ids"]]), len(line["autoregressive_ids"])
        row = rows.setdefault(line["benchmark"], dict.fromkeys(("prompts", "identical", "as_ours"), 0))
        answers = {}
        for name in list(ways) if n % 2 else list(ways)[::-1]:
            if n == 0:
                answer(model, prompt, 8, **ways[name])  # warms up
            first = min(answer(model, prompt, 1, **ways[name])[1] for _ in range(2))
            answers[name], seconds = answer(model, prompt, count, **ways[name])
            for key, value in (("tokens", len(answers[name]) - 1), ("seconds", seconds - first)):
                row[f"{name}_{key}"] = row.get(f"{name}_{key}", 0) + value
        row["prompts"] += 1
        row["identical"] += answers["plain"] == answers["lookup"]
        row["as_ours"] += answers["plain"] == line["autoregressive_ids"]
    for name, row in rows.items():
        speeds = [row[f"{way}_tokens"] / row[f"{way}_seconds"] for way in ways]
        row |= {
            "tokens_per_second": speeds[1],
            "baseline_tokens_per_second": speeds[0],
            "speedup": speeds[1] / speeds[0],
        }
        rows[name] = row
        same = f"{row['identical']} of {row['prompts']} answers identical to plain decoding's, {row['as_ours']} to ours"
        print(f"{name}: {speeds[1]:.1f} token/s, plainly {speeds[0]:.1f}: speedup {row['speedup']:.2f}; {same}")
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    about |= {"dtype": dtype, "most_looked_up": int(tokens)}
    Path(output).write_text(json.dumps(about | {"results": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.inference_mode():
        main(*sys.argv[1:])
