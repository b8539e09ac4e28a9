"""Decodes the prompts of a job with the official EAGLE code, one at a time, as a chain.

The job's `code` is a directory of that code (github.com/SafeAILab/EAGLE), which is a program to run, not a package. A
chain is its tree with one branch: top_k = 1, depth = K - 1 (it drafts one level before the first), total_token = K + 1.
"""

import random
import sys
import time
import types

import answering

try:
    import torch
    import transformers
except ModuleNotFoundError as missing:
    print(f"{missing}", file=sys.stderr)
    sys.exit(3)


class NoTokenizer:
    """Stands in for the tokenizer, of which only the end token is used: prompts are token ids."""

    def __init__(self, stop_ids):
        self.eos_token_id = stop_ids[0] if stop_ids else -1


def start(job):
    """(model, the module whose verification is counted)."""
    sys.path.insert(0, job["code"])
    from eagle.model import ea_model

    tokenizer = NoTokenizer(job["stop_ids"])
    ea_model.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda *args, **kwargs: tokenizer)
    model = ea_model.EaModel.from_pretrained(
        use_eagle3=True,
        base_model_path=job["target"],
        ea_model_path=job["drafter"],
        total_token=job["window"] + 1,
        depth=job["window"] - 1,
        top_k=1,
        torch_dtype=getattr(torch, job["dtype"]),
    )
    return model.eval(), ea_model


def cut(tokens, job):
    """An answer up to its end token or its maximum length: the program goes on to the end of its last round."""
    ends = [n + 1 for n, token in enumerate(tokens) if token in job["stop_ids"]]
    return tokens[: min([job["max_new_tokens"], *ends])]


def decode(started, job, prompt, temperature, seed):
    """One answer: its tokens, seconds, rounds and accepted tokens by position."""
    model, module = started
    accepted = []
    evaluate = module.evaluate_posterior

    def counted(*args):
        found = evaluate(*args)
        accepted.append(int(found[1]))
        return found

    torch.manual_seed(seed)
    random.seed(seed)
    module.evaluate_posterior = counted
    room = job["max_length"] + 4 * job["window"] + 64  # it goes on for a round after the last token
    how = {"temperature": temperature, "max_new_tokens": job["max_new_tokens"], "max_length": room}
    generate = model.naivegenerate if job["plain"] else model.eagenerate
    begin, cpu = time.perf_counter(), time.process_time()
    try:
        tokens = generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()
    finally:
        module.evaluate_posterior = evaluate
    spent = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    tokens = cut(tokens, job)
    if job["plain"]:
        return {"tokens": tokens, "rounds": None, "accepted": None} | spent
    used, length = [], 1  # the first token is the prefill's; a round adds the accepted ones and the target's own
    for count in accepted:
        if length >= len(tokens):
            break
        used.append(count)
        length += count + 1
    by_position = [sum(count >= j for count in used) for j in range(1, job["window"] + 1)]
    return {"tokens": tokens, "rounds": len(used), "accepted": by_position} | spent


if __name__ == "__main__":
    version = f"with torch {torch.__version__}, transformers {transformers.__version__}"
    answering.main("eagle", version, start, decode)
