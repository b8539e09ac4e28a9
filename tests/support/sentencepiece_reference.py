"""SentencePiece's BPE, step by step: the neighbours whose union has the best score are joined, the leftmost first."""

import random

BLANK = "\u2581"


def encode(text: str, scores: dict[str, float], prefix: bool = True) -> list[str]:
    """The pieces of a text without control tokens; characters in no piece come as bytes `<0x..>`."""
    if not text:
        return []
    parts = list(((" " if prefix else "") + text).replace(" ", BLANK))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    pieces = []
    for part in parts:
        pieces += [part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()]
    return pieces


def learn(texts: list[str], size: int) -> list[str]:
    """Pieces as training makes them: all characters but the rarest, and joins of the most frequent neighbours."""
    words = [list((" " + text).replace(" ", BLANK)) for text in texts]
    made: list[str] = []
    while len(made) < size:
        counts: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        pair = max(counts, key=lambda p: (counts[p], p))
        if "".join(pair) not in made:
            made.append("".join(pair))
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == pair:
                    word[at : at + 2] = ["".join(pair)]
                at += 1
    return made


def random_text(rng: random.Random, letters: str, longest: int) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randrange(longest + 1)))
