"""Decodes the prompts of a job with sglang-jax's offline engine, one at a time.

Written after `python/sgl_jax/srt/entrypoints/engine.py` and `server_args.py` of its repository (commit cddbf6f). Its
answers do not tell how many drafted tokens were accepted, so only tokens are compared.
"""

import json
import sys
import time
from importlib import metadata

try:
    from sgl_jax.srt.entrypoints.engine import Engine
except ModuleNotFoundError as missing:
    print(f"{missing}", file=sys.stderr)
    sys.exit(3)


def start(job):
    """The engine, for one request at a time."""
    how = {
        "model_path": job["target"],
        "dtype": job["dtype"],
        "context_length": job["max_length"],
        "max_running_requests": 1,
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "disable_overlap_schedule": True,
        "enable_deterministic_sampling": True,
    }
    if not job["plain"]:
        how |= {
            "speculative_algorithm": "EAGLE3",
            "speculative_draft_model_path": job["drafter"],
            "speculative_num_steps": job["window"],
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": job["window"] + 1,
        }
    return Engine(**how)


def decode(engine, job, prompt, temperature, seed):
    """One answer: its tokens and seconds."""
    params = {
        "temperature": temperature,
        "max_new_tokens": job["max_new_tokens"],
        "stop_token_ids": job["stop_ids"],
        "sampling_seed": seed,
    }
    begin = time.perf_counter()
    output = engine.generate(input_ids=[prompt], sampling_params=[params])[0]
    seconds = time.perf_counter() - begin
    return {"tokens": list(output["output_ids"]), "seconds": seconds, "rounds": None, "accepted": None}


def main(job_path, answers_path):
    """Answers every prompt at every temperature, after one that only warms up."""
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    engine = start(job)
    decode(engine, job | {"max_new_tokens": 4}, job["prompts"][0], 0.0, 0)
    runs = []
    for temperature in job["temperatures"]:
        for seed in job["seeds"] if temperature else job["seeds"][:1]:
            answers = [decode(engine, job, prompt, temperature, seed) for prompt in job["prompts"]]
            runs.append({"temperature": temperature, "seed": seed, "answers": answers})
    engine.shutdown()
    with open(answers_path, "w", encoding="utf-8") as file:
        json.dump({"engine": "sglang-jax", "version": metadata.version("sglang-jax"), "runs": runs}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
