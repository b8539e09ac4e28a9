"""Decodes the prompts of a job with SGLang's offline engine, one at a time.

Written after `sglang/srt/entrypoints/engine.py` and `sglang/srt/managers/tokenizer_manager.py` of sglang 0.5.23, whose
answers hold `spec_verify_ct` and `spec_correct_drafts_histogram`.
"""

import sys
import time

import answering
import sglang_settings

try:
    import sglang
except ModuleNotFoundError as missing:
    print(f"{missing}", file=sys.stderr)
    sys.exit(3)


def start(job):
    """The engine, for one request at a time."""
    return sglang.Engine(**sglang_settings.of_engine(job))


def decode(engine, job, prompt, temperature, seed):
    """One answer: its tokens, seconds, rounds and accepted tokens by position."""
    params = sglang_settings.of_request(job, temperature, seed)
    begin = time.perf_counter()
    output = engine.generate(input_ids=prompt, sampling_params=params)
    seconds = time.perf_counter() - begin
    found = {"tokens": list(output["output_ids"]), "seconds": seconds, "rounds": None, "accepted": None}
    histogram = output["meta_info"].get("spec_correct_drafts_histogram")
    if histogram and not job["plain"]:
        by_position = [sum(histogram[j:]) for j in range(1, job["window"] + 1)]
        found |= {"rounds": sum(histogram), "accepted": by_position}
    return found


if __name__ == "__main__":
    answering.main("sglang", sglang.__version__, start, decode).shutdown()
