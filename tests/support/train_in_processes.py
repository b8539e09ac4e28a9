"""Run by test_distributed.py: one of several processes that train together, on a target that compiles in seconds.

    python tests/support/train_in_processes.py WORKDIR PORT NUM_PROCESSES PROCESS_ID DIE_AT STAGES

DIE_AT: the last process is killed, as by `kill -9`, once the checkpoint of this step has begun to be written; 0: never.
"""

import dataclasses
import os
import signal
import sys

from ppow_jax import cli
from ppow_jax.training import pipeline
from ppow_jax.training.run import checkpoint
from ppow_jax.training.settings import TrainSettings
from ppow_jax.weights import tiny


def settings(workdir: str, stages: str) -> TrainSettings:
    return TrainSettings(
        workdir=workdir,
        stages=tuple(stages.split(",")),
        target="tiny",
        dtype="float32",
        data="builtin",
        num_answers=16,
        held_out=4,
        max_prompt_tokens=96,
        answer_tokens=16,
        answer_slots=8,
        answer_chunk=8,
        draft_vocab_size=64,
        feature_layers=(0, 1, 2),
        batch_size=4,
        row_length=128,
        max_anchors=32,
        supervised_steps=6,
        ttt_steps=2,
        warmup_steps=1,
        learning_rate=1e-3,
        ppow_steps=3,
        adaw_start=1,
        window=2,
        group=2,
        windows=2,
        gamma=0.12,
        checkpoint_every=2,
        evaluate_every=3,
        modes=("chain",),  # what an adaptive window drafts depends on the costs that each run measures
        benchmarks=("builtin",),
        num_prompts=2,
        max_new_tokens=8,
    )


def die_at(step: int) -> None:
    save = checkpoint.Checkpoints.save

    def save_and_die(self, at, *rest):
        save(self, at, *rest)
        if at == step and self.directory.name == "checkpoints":
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.Checkpoints.save = save_and_die


def main(s: TrainSettings) -> int:
    return pipeline.run(s)


if __name__ == "__main__":
    workdir, port, number, me, death, stages = sys.argv[1:]
    tiny.CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=2)
    if int(death) and int(me) == int(number) - 1:
        die_at(int(death))
    s = settings(workdir, stages)
    if int(number) > 1:
        together = {"coordinator": f"localhost:{port}", "num_processes": int(number), "process_id": int(me)}
        s = dataclasses.replace(s, **together)
    cli.setup_logging()
    sys.exit(main(s))
