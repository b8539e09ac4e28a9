"""Damage to files: contents that are not what the name says, and random accidents."""

import random
from pathlib import Path

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 9437184\n"
PAGE = "\n<!DOCTYPE html>\n<html><head><title>Page</title></head></html>"


def mutate(path: Path, rng: random.Random) -> None:
    """One random accident to a file: cut, flip a bit (mostly in the header), repeat or fill a part."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(min(len(data), 1500) if rng.random() < 0.7 else len(data))
    kind = rng.randrange(4)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at:at] = data[at : at + rng.randrange(1, 40)]
    else:
        data[at : at + 8] = bytes(rng.choice(b'\x00\xff9"{]') for _ in range(8))
    path.write_bytes(bytes(data))
