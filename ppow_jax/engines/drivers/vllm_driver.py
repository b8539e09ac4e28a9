"""Decodes the prompts of a job with vLLM, one at a time, and counts what its drafter gained."""

import os
import sys
import time
from pathlib import Path

import answering

OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"  # vLLM asks for it on CPUs: without it, drafting is slow
if OPENMP.exists() and "libiomp5" not in os.environ.get("LD_PRELOAD", ""):
    preload = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(OPENMP)]))
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": preload})

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine's core runs in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything it needs is in the job's directories

try:
    import vllm
except ModuleNotFoundError as missing:
    print(f"{missing}", file=sys.stderr)
    sys.exit(3)


def start(job):
    """The engine, for one request at a time."""
    speculation = None
    if not job["plain"]:
        speculation = {"method": "eagle3", "model": job["drafter"], "num_speculative_tokens": job["window"]}
    return vllm.LLM(
        model=job["target"],
        dtype=job["dtype"],
        max_model_len=job["max_length"],
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        speculative_config=speculation,
    )


def counters(llm, window):
    """(rounds, rounds that accepted the first 1..K drafted tokens) since the engine started."""
    rounds, accepted = 0, [0] * window
    for metric in llm.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            rounds = metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted = list(metric.values)
    return rounds, accepted


def decode(llm, job, prompt, temperature, seed):
    """One answer: its tokens, seconds, rounds and accepted tokens by position."""
    params = vllm.SamplingParams(
        temperature=temperature,
        seed=seed,
        max_tokens=job["max_new_tokens"],
        stop_token_ids=job["stop_ids"],
        detokenize=False,
    )
    rounds, accepted = counters(llm, job["window"])
    begin, cpu = time.perf_counter(), time.process_time()
    output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
    found = {
        "tokens": list(output.outputs[0].token_ids),
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "rounds": None,
        "accepted": None,
    }
    if not job["plain"]:
        now, total = counters(llm, job["window"])
        found |= {"rounds": now - rounds, "accepted": [b - a for a, b in zip(accepted, total, strict=True)]}
    return found


if __name__ == "__main__":
    answering.main("vllm", vllm.__version__, start, decode)
