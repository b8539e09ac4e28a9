"""Decodes the prompts of a job with sglang-jax's offline engine, one at a time.

Written after `python/sgl_jax/srt/entrypoints/engine.py` and `server_args.py` of its repository (commit cddbf6f). Its
answers do not tell how many drafted tokens were accepted, so only tokens are compared.
"""

import sys
import time
from importlib import metadata

import answering
import sglang_settings

try:
    from sgl_jax.srt.entrypoints.engine import Engine
except ModuleNotFoundError as missing:
    print(f"{missing}", file=sys.stderr)
    sys.exit(3)


def start(job):
    """The engine, for one request at a time."""
    own = {"disable_overlap_schedule": True, "enable_deterministic_sampling": True}
    return Engine(**sglang_settings.of_engine(job), **own)


def decode(engine, job, prompt, temperature, seed):
    """One answer: its tokens and seconds."""
    params = sglang_settings.of_request(job, temperature, seed)
    begin = time.perf_counter()
    output = engine.generate(input_ids=[prompt], sampling_params=[params])[0]
    seconds = time.perf_counter() - begin
    return {"tokens": list(output["output_ids"]), "seconds": seconds, "rounds": None, "accepted": None}


if __name__ == "__main__":
    answering.main("sglang-jax", metadata.version("sglang-jax"), start, decode).shutdown()
