"""Speculation modes and sizes that every program starts from, so that the same words mean the same everywhere.

- window, K: the most drafted tokens that a round can accept: length of a chain, levels of a tree. In adaptive mode it
  is a maximum.
- nodes: verified nodes of a tree, in adaptive mode the maximum. branch: nodes expanded per level, children per node.

The mixture of drafter and n-gram lookup is the default: it was the fastest mode on the mean of the prompts that were
measured (README), and it drafts and verifies only what is worth its measured cost on the device. Training measures
adaptive decoding, in which all drafts are the drafter's.
"""

MODE = "mixture"  # with a drafter
MODE_WITHOUT = "ngram"  # without one
WINDOW = 4
BRANCH, NODES = 3, 15


def mode(drafter: bool) -> str:
    """The default speculation mode. drafter: there is one."""
    return MODE if drafter else MODE_WITHOUT


WINDOW_HELP = (
    "Drafted tokens per round, K: length of a chain, levels of a tree; a maximum in adaptive mode. "
    f"By default {WINDOW}."
)
MODE_HELP = f"Speculation mode. By default {MODE} if there is a drafter, else {MODE_WITHOUT}."
NODES_HELP = f"Verified nodes of a tree; a maximum in adaptive mode. By default {NODES}."
BRANCH_HELP = f"Nodes expanded per level of a tree, and children per node. By default {BRANCH}."
DEPTH_HELP = "Levels of a tree of fixed size, in place of --window."
