"""Common part of all drivers: reads a job, answers its prompts, and writes the answers."""

import json
import sys


def main(engine, version, start, decode):
    """Answers every prompt at every temperature, after one that only warms up -> what `start` made.

    start(job): loads the engine. decode(started, job, prompt, temperature, seed): one answer.
    """
    job_path, answers_path = sys.argv[1:]
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    started = start(job)
    decode(started, job | {"max_new_tokens": 4}, job["prompts"][0], 0.0, 0)
    runs = []
    for temperature in job["temperatures"]:
        for seed in job["seeds"] if temperature else job["seeds"][:1]:
            answers = [decode(started, job, prompt, temperature, seed) for prompt in job["prompts"]]
            runs.append({"temperature": temperature, "seed": seed, "answers": answers})
    with open(answers_path, "w", encoding="utf-8") as file:
        json.dump({"engine": engine, "version": version, "runs": runs}, file)
    return started
