"""The trace of an answer: the same answer, probabilities that the target and the drafter give, and a whole page."""

import functools
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, MODES, NEW, model, tokenizer

from ppow_jax.inference.requests import Result, Stats
from ppow_jax.inference.trace import Drafted, Step, Trace, record
from ppow_jax.inference.trace_page import SOURCES
from ppow_jax.models import transformer
from ppow_jax.speculation.settings import chain, tree

PROMPT = "Once"
SETTINGS = {
    "off": {},
    "chain": {"temperature": 0.9, "top_p": 0.95, "seed": 3},
    "adaptive": {},
    "tree": {"stop": "b"},
    "ngram": {"temperature": 0.9, "seed": 3},
    "mixture": {},
}


@functools.cache
def traced(mode: str) -> Trace:
    return record(model(), PROMPT, max_new_tokens=NEW, speculation=MODES[mode], **SETTINGS[mode])


@pytest.mark.parametrize("mode", MODES)
def test_a_trace_is_of_the_answer_that_generate_gives(mode):
    found = traced(mode)
    (result,) = model().generate(PROMPT, max_new_tokens=NEW, speculation=MODES[mode], **SETTINGS[mode])
    same = ("text", "token_ids", "finish_reason", "prompt_ids")
    assert [getattr(found.result, name) for name in same] == [getattr(result, name) for name in same]
    if mode != "tree":  # there the trace looks for the stop text after every round
        assert repr(found.result.stats) == repr(result.stats)
    ids, origin = result.token_ids[:1], ["target"]
    for step in found.steps:
        assert step.root == ids[-1]
        path = [step.drafted[n] for n in step.accepted]
        assert [token.parent for token in path] == [0, *(n + 1 for n in step.accepted)][: len(path)]
        ids += [*(token.token for token in path), step.own][: step.gained]
        origin += [*(token.source for token in path), "target"][: step.gained]
        assert step.verify_seconds > 0 and step.draft_seconds >= 0
    assert ids[: len(result.token_ids)] == result.token_ids
    assert result.sources == found.result.sources == origin[: len(result.token_ids)]
    assert result.drafted == [source != "target" for source in result.sources]
    assert any(result.drafted) or mode != "chain"
    assert sum(len(step.accepted) for step in found.steps) == found.result.stats.num_accepted_draft_tokens
    assert sum(len(step.drafted) for step in found.steps) == found.result.stats.num_draft_tokens


def target_law(ids) -> np.ndarray:
    """Distribution of the next token, at temperature 1."""
    return np.asarray(_law(jnp.asarray(np.pad(ids, (0, 64 - len(ids)))), len(ids)))


@jax.jit
def _law(ids_T, length):
    params, T = model().target.params, len(ids_T)
    out = transformer.forward(params, CONFIG, ids_T[None], jnp.arange(T)[None], transformer.causal_mask(1, T))
    return jax.nn.softmax(transformer.logits(params, out.hidden_BxSxD[0, length - 1]))


@pytest.mark.parametrize("mode", ["chain", "tree"])
def test_probabilities_are_those_of_the_models(mode):
    found = traced(mode)
    ids = [*found.result.prompt_ids, found.result.token_ids[0]]
    for step in found.steps[:6]:
        paths = [ids]
        for token in step.drafted:
            before = paths[token.parent]
            paths.append([*before, token.token])
            assert token.target == pytest.approx(target_law(before)[token.token], rel=1e-3, abs=1e-6)
        for parent in {token.parent for token in step.drafted}:
            siblings = [token.drafter for token in step.drafted if token.parent == parent]
            assert 0 < min(siblings) and sum(siblings) <= 1.0001
        before = paths[max((n + 1 for n in step.accepted), default=0)]
        law = target_law(before)
        assert step.own_target == pytest.approx(law[step.own], rel=1e-3, abs=1e-6)
        assert [token for token, _ in step.likely] == np.argsort(-law)[: len(step.likely)].tolist()
        ids = [*before, step.own]


class Reader(HTMLParser):
    """Collects tags, checks that they close, and keeps the answer's text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.answer, self.tips = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "data-tip" in attributes:
            self.tips.append(attributes["data-tip"])
        if tag != "meta":
            self.open.append((tag, attributes.get("class", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(kind == "answer" for _, kind in self.open) and "hidden" not in self.open[-1][1]:
            self.answer.append(data)


def read(path) -> tuple[str, Reader]:
    text, reader = path.read_bytes().decode(), Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return text, reader


@pytest.mark.parametrize("mode", MODES)
def test_the_page_holds_the_answer_and_every_step(mode, tmp_path):
    found = traced(mode)
    found.write(tmp_path / "trace.html")
    shown = repr(found)
    assert shown.startswith(f"Trace({found.target}, ") and len(shown.splitlines()) == 1 and len(shown) < 300
    text, reader = read(tmp_path / "trace.html")
    assert "".join(reader.answer) == found.result.text
    kinds = [attributes.get("class", "") for _, attributes in reader.tags]
    ids = [attributes["id"] for _, attributes in reader.tags if attributes.get("id", "").startswith("s")]
    assert ids == [f"s{n}" for n in range(1, len(found.steps) + 1)]
    drafted = [token for step in found.steps for token in step.drafted]
    for kind, accepted in (("c ok", True), ("c no", False)):
        sources = {"drafter": kind, "ngram": f"{kind} ngram", "both": f"{kind} ngram both"}
        for source, name in sources.items():
            shown = sum(token.accepted == accepted and token.source == source for token in drafted)
            assert kinds.count(name) == shown + (source == "drafter")  # one in the legend
    assert ("t ok ngram" in kinds) == bool(found.speculation.lookup)
    assert ("by source" in text) == (mode == "mixture")
    for source, name in SOURCES.items() if mode == "mixture" else ():
        mine = [token.accepted for token in drafted if token.source == source]
        assert f" {name} {sum(mine)} of {len(mine)}" in text
    assert kinds.count("c own") == len(found.steps) + 1
    assert not re.search(r"https?:|//\w|url\(|@import", text)  # nothing from elsewhere
    assert not {"src", "href"} & {name for _, attributes in reader.tags for name in attributes}


def test_texts_are_escaped_and_characters_come_whole(tmp_path):
    ids = tokenizer()('<b>&"é\n')["input_ids"]  # é is two tokens
    drafted = (Drafted(ids[1], 0, 0.5, 0.25, True), Drafted(ids[2], 1, 0.125, 1e-5, False))
    likely = ((ids[0], 0.75), (ids[3], 0.002))
    steps = [Step(ids[0], drafted, ids[2], 0.0625, likely, 2, 0.001, 0.004)]
    steps += [Step(ids[n - 1], (), ids[n], 1.0, likely, 1, 0.0, 0.002) for n in range(3, len(ids))]
    stats = Stats.of([len(steps) - 1, 1, 0], 2)
    result = Result('<b>&"é\n', ids, "length", ids[:1], stats, 0.1, 0.2)
    Trace("<script>", "</pre>", chain(2), {}, tuple(steps), result, tokenizer()).write(tmp_path / "trace.html")
    _, reader = read(tmp_path / "trace.html")
    assert reader.answer == ["<", "b", ">", "&", '"', "é", "\n"]
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert any("drafter 12 % · target under 0.1 %" in tip and "rejected" in tip for tip in reader.tips)
    assert any("75 %  <" in tip and "0.2 %" in tip for tip in reader.tips)


def test_a_trace_without_rounds_is_a_page_too(tmp_path):
    one = record(model(), PROMPT, max_new_tokens=1, speculation=tree(2, 2, 4))
    assert one.steps == () and len(one.result.token_ids) == 1
    one.write(tmp_path / "trace.html")
    _, reader = read(tmp_path / "trace.html")
    assert "".join(reader.answer) == one.result.text
