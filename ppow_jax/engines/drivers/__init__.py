"""Programs that run in an engine's own environment: plain Python that reads a job and writes answers, both as JSON.

Each is called `python DRIVER JOB.json ANSWERS.json`; `engines.job` documents both files. They import each other, and
nothing else of ppow_jax, since it is not installed there. Exit code 3: the engine is not installed in this environment.
"""
