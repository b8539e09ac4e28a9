"""Decodes the prompts of a job with SGLang's offline engine, one at a time.

Written after `sglang/srt/entrypoints/engine.py` and `sglang/srt/managers/tokenizer_manager.py` of sglang 0.5.23, whose
answers hold `spec_verify_ct` and `spec_correct_drafts_histogram`.
"""

import json
import sys
import time

try:
    import sglang
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
    }
    if not job["plain"]:
        how |= {
            "speculative_algorithm": "EAGLE3",
            "speculative_draft_model_path": job["drafter"],
            "speculative_num_steps": job["window"],
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": job["window"] + 1,
        }
    return sglang.Engine(**how)


def decode(engine, job, prompt, temperature, seed):
    """One answer: its tokens, seconds, rounds and accepted tokens by position."""
    params = {
        "temperature": temperature,
        "max_new_tokens": job["max_new_tokens"],
        "stop_token_ids": job["stop_ids"],
        "sampling_seed": seed,
    }
    begin = time.perf_counter()
    output = engine.generate(input_ids=prompt, sampling_params=params)
    seconds = time.perf_counter() - begin
    found = {"tokens": list(output["output_ids"]), "seconds": seconds, "rounds": None, "accepted": None}
    histogram = output["meta_info"].get("spec_correct_drafts_histogram")
    if histogram and not job["plain"]:
        by_position = [sum(histogram[j:]) for j in range(1, job["window"] + 1)]
        found |= {"rounds": sum(histogram), "accepted": by_position}
    return found


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
        json.dump({"engine": "sglang", "version": sglang.__version__, "runs": runs}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
