"""Settings that SGLang and sglang-jax name alike."""


def of_engine(job):
    """Settings of an engine for one request at a time."""
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
    return how


def of_request(job, temperature, seed):
    """Sampling parameters of one request."""
    return {
        "temperature": temperature,
        "max_new_tokens": job["max_new_tokens"],
        "stop_token_ids": job["stop_ids"],
        "sampling_seed": seed,
    }
