"""A trace and its HTML page: one file, without external scripts or styles."""

import dataclasses
import os
from html import escape
from string import Template
from typing import Any

from ppow_jax.files import write_atomic
from ppow_jax.inference.requests import Result
from ppow_jax.speculation.settings import Speculation

SOURCES = {"drafter": "drafter", "ngram": "n-gram lookup", "both": "drafter and n-gram lookup"}


@dataclasses.dataclass(frozen=True)
class Drafted:
    """A drafted token. parent: index in the window of the token that it follows, 0 for the root, n + 1 for drafted[n].

    drafter, target: the probability that each gives to it there, at temperature 1. source: one of
    `speculation.sources.NAMES`; where an n-gram lookup drafted the token, `drafter` is the probability that its
    statistics, and those of the drafter, give to it.
    """

    token: int
    parent: int
    drafter: float
    target: float
    accepted: bool
    source: str = "drafter"


@dataclasses.dataclass(frozen=True)
class Step:
    """A round: the tokens drafted after `root`, parents first, and the token that the target added itself.

    own_target: the target's probability of that token; likely: its most probable tokens there; both at temperature 1.
    gained: tokens added to the answer; fewer than the accepted ones and the target's own where it ended among them.
    """

    root: int
    drafted: tuple[Drafted, ...]
    own: int
    own_target: float
    likely: tuple[tuple[int, float], ...]
    gained: int
    draft_seconds: float
    verify_seconds: float

    @property
    def accepted(self) -> list[int]:
        """Indices of the accepted tokens in `drafted`."""
        return [n for n, token in enumerate(self.drafted) if token.accepted]


@dataclasses.dataclass(frozen=True)
class Trace:
    """An answer and the rounds that made it; its first token came with the prefill. settings: as given to `record`."""

    target: str
    prompt: str
    speculation: Speculation
    settings: dict[str, Any]
    steps: tuple[Step, ...]
    result: Result
    tokenizer: Any

    def write(self, path: str | os.PathLike) -> None:
        """Writes one self-contained HTML page."""
        write_atomic(path, page(self))

    def __repr__(self) -> str:
        return f"Trace({self.target}, {self.speculation.mode}, {len(self.steps)} steps; {self.result!r})"

    def _repr_html_(self) -> str:
        """The page in an iframe, for notebooks."""
        style = "width:100%;height:600px;border:1px solid #d9dce0;border-radius:6px"
        return f'<iframe srcdoc="{escape(page(self))}" style="{style}"></iframe>'


def page(trace: Trace) -> str:
    """The whole page."""
    return _PAGE.substitute(
        style=_STYLE,
        script=_SCRIPT,
        title=escape(f"{trace.target}, {trace.speculation.mode}"),
        facts=escape(_facts(trace)),
        totals=_totals(trace),
        prompt=escape(trace.prompt),
        answer=_answer(trace),
        copied=_COPIED if trace.speculation.lookup else "",
        steps="\n".join(_step(trace, number) for number in range(1, len(trace.steps) + 1)),
    )


def _facts(trace: Trace) -> str:
    speculation = trace.speculation
    if speculation.lookup and not speculation.shape:
        size = f"n-gram lookup of up to {speculation.lookup} tokens"
    elif speculation.shape:
        size = f"{speculation.shape.nodes} nodes, depth {speculation.shape.depth}, branch {speculation.shape.branch}"
        size = f"adaptive tree of up to {size}" if speculation.adaptive else f"tree of {size}"
        size += f", shared with n-gram lookup of up to {speculation.lookup} tokens" if speculation.lookup else ""
    else:
        size = f"{'adaptive chain of up to' if speculation.adaptive else 'chain of'} {speculation.window}"
        size = size if speculation.window else "no speculation"
    usual = {"temperature": None, "top_k": 0, "top_p": 1.0, "seed": None if trace.settings.get("temperature") else 0}
    given = {"temperature": 0} | {name: value for name, value in trace.settings.items() if name != "speculation"}
    told = {name: value for name, value in given.items() if value != usual.get(name) and value not in ((), None)}
    return " · ".join([trace.target, size, *(f"{name.replace('_', ' ')} {_plain(v)}" for name, v in told.items())])


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _totals(trace: Trace) -> str:
    steps, stats = trace.steps, trace.result.stats
    draft, verify = sum(s.draft_seconds for s in steps), sum(s.verify_seconds for s in steps)
    gained, seconds, count = sum(s.gained for s in steps), draft + verify, max(1, len(steps))
    tiles = [
        (f"{len(trace.result.token_ids)}", f"tokens in {len(steps)} steps; the first came with the prompt"),
        (f"{gained / count:.2f}", "tokens per verification (tau)"),
        (f"{stats.num_accepted_draft_tokens} of {stats.num_draft_tokens}", "drafted tokens accepted"),
        (f"{gained / seconds:.0f} token/s" if steps else "–", "of drafting and verification"),
    ]
    shown = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in tiles)
    share = 100 * draft / seconds if steps else 0
    return f"""<div class="tiles">{shown}</div>
<div class="split">{_bar(share, 100 - share)}</div>
<p class="note"><i class="dot draft"></i>drafting {1000 * draft / count:.1f} ms a step, {share:.0f} %
<i class="dot verify"></i>verification {1000 * verify / count:.1f} ms a step, {100 - share:.0f} % ·
reading the prompt {1000 * trace.result.prefill_seconds:.0f} ms</p>{_by_source(trace)}"""


def _by_source(trace: Trace) -> str:
    """Accepted of drafted tokens by source, where there are two."""
    if not (trace.speculation.lookup and trace.speculation.shape):
        return ""
    drafted = [token for step in trace.steps for token in step.drafted]
    told = []
    for source, name in SOURCES.items():
        mine = [token.accepted for token in drafted if token.source == source]
        told.append(f"{name} {sum(mine)} of {len(mine)}")
    return f'\n<p class="note">accepted of drafted tokens by source: {", ".join(told)}</p>'


def _answer(trace: Trace) -> str:
    """Every token as a span: its origin, and the step that made it."""
    ids, decode = trace.result.token_ids, trace.tokenizer.decode
    origins = [("first", 0, "from reading the prompt")]
    for number, step in enumerate(trace.steps, 1):
        made = [(_accepted(step, n), number, _drafted_tip(trace, step, n)) for n in step.accepted]
        origins += [*made, ("own", number, _own_tip(trace, step))][: step.gained]
    spans, shown = [], 0
    for n, (kind, number, tip) in enumerate(origins[: len(ids)], 1):
        text = decode(ids[:n], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        stop = len(text.rstrip("\ufffd")) if n < len(ids) else len(text)
        piece, shown = trace.result.text[shown:stop], max(shown, stop)
        if not piece and "\ufffd" not in (label := decode([ids[n - 1]])):
            kind, piece = f"{kind} hidden", label  # an end token, or text cut off by a stop text
        place = f"step {number}\n" if number else ""
        about = f'class="t {kind}" data-step="{number}" data-tip="{escape(place + tip)}"'
        written = escape(piece).replace("\r", "&#13;")  # browsers would turn it into a line break
        spans.append(f"<span {about}>{written}</span>")
    return "".join(spans)


def _accepted(step: Step, n: int) -> str:
    """CSS classes of an accepted token."""
    return "ok" if step.drafted[n].source == "drafter" else "ok ngram"


def _step(trace: Trace, number: int) -> str:
    step = trace.steps[number - 1]
    most = max(s.draft_seconds + s.verify_seconds for s in trace.steps)
    bar = _bar(100 * step.draft_seconds / most, 100 * step.verify_seconds / most)
    draft, verify = 1000 * step.draft_seconds, 1000 * step.verify_seconds
    window = f"{len(step.accepted)} of {len(step.drafted)}" if step.drafted else "no draft"
    root = f'<span class="c root">{_label(trace, step.root)}</span>'
    return f"""<div class="step" id="s{number}"><span class="n">{number}</span>
<div class="window"><div class="node">{root}{_children(trace, step, 0)}</div></div>
<span class="n">{window}</span>
<div class="time" data-tip="drafting {draft:.2f} ms\nverification {verify:.2f} ms"><div class="bar">{bar}</div>
<span class="n">{draft:.1f} + {verify:.1f} ms</span></div></div>"""


def _bar(draft: float, verify: float) -> str:
    """Both times, in percent of the width."""
    return f'<i class="draft" style="width:{draft:.1f}%"></i><i class="verify" style="width:{verify:.1f}%"></i>'


def _children(trace: Trace, step: Step, index: int) -> str:
    """Branches after a window index: first the token that the answer took, then the others, likeliest first."""
    nodes = [(n, token) for n, token in enumerate(step.drafted) if token.parent == index]
    nodes.sort(key=lambda node: (not node[1].accepted, -node[1].drafter))
    shown = []
    if index == max((n + 1 for n in step.accepted), default=0):
        shown.append(_node("own", _label(trace, step.own), _own_tip(trace, step), ""))
    for n, token in nodes:
        kind, label = "ok" if token.accepted else "no", _label(trace, token.token)
        if kind == "no":  # struck through, except for leading blanks
            word = label.lstrip()
            label = f"{label[: len(label) - len(word)]}<s>{word}</s>"
        kind += {"drafter": "", "ngram": " ngram", "both": " ngram both"}[token.source]
        shown.append(_node(kind, label, _drafted_tip(trace, step, n), _children(trace, step, n + 1)))
    return f'<div class="kids">{"".join(shown)}</div>' if shown else ""


def _node(kind: str, label: str, tip: str, children: str) -> str:
    return f'<div class="node"><span class="c {kind}" data-tip="{escape(tip)}">{label}</span>{children}</div>'


def _drafted_tip(trace: Trace, step: Step, n: int) -> str:
    token = step.drafted[n]
    verdict = "accepted" if token.accepted else "rejected"
    chances = f"{SOURCES[token.source]} {_percent(token.drafter)} · target {_percent(token.target)}"
    return f"drafted, {verdict}\n{chances}\ntoken {token.token}"


def _own_tip(trace: Trace, step: Step) -> str:
    likely = "\n".join(f"{_percent(p)}  {_visible(trace.tokenizer.decode([token]))}" for token, p in step.likely)
    return f"added by the target, {_percent(step.own_target)}\ntoken {step.own}\nmost probable here:\n{likely}"


def _label(trace: Trace, token: int) -> str:
    return escape(_visible(trace.tokenizer.decode([token])))


def _visible(text: str) -> str:
    """Replaces white space that would be invisible by visible signs."""
    text = text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return text if text.strip() else text.replace(" ", "␣") or "∅"


def _percent(p: float) -> str:
    return f"{100 * p:.0f} %" if p >= 0.0995 else f"{100 * p:.1f} %" if p >= 0.001 else "under 0.1 %"


_COPIED = ' <span class="t ok ngram">dotted: from n-gram lookup</span> (in the steps, dashed where the drafter agrees)'
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header><h1>One answer, step by step</h1><p class="note">$facts</p></header>
<section>$totals</section>
<section>
<h2>Answer</h2>
<p class="note"><span class="t ok">drafted and accepted</span> <span class="t own">added by the target</span>
<span class="t first">from reading the prompt</span>$copied · point at a token for probabilities, click it for its
step</p>
<div class="answer">$answer</div>
<details><summary>Prompt</summary><pre>$prompt</pre></details>
</section>
<section>
<h2>Steps</h2>
<p class="note">After the <span class="c root">last token</span> the drafter proposes; the target verifies all at once,
keeps <span class="c ok">what agrees</span>, drops <span class="c no"><s>the rest</s></span> and
<span class="c own">adds one token</span>. Probabilities are at temperature 1.</p>
<div class="steps"><div class="step head"><span class="n">step</span><span>window</span>
<span class="n">accepted of drafted</span>
<span class="n">drafting + verification</span></div>
$steps
</div>
</section>
</main>
<div id="tip" role="tooltip"></div>
<script>$script</script>
</body>
</html>
""")

_STYLE = """
:root{--bg:#f7f7f5;--card:#fff;--fg:#1d2126;--muted:#68707a;--line:#d9dce0;--ok:#1a7f4b;--ok-bg:#d9f2e3;--own:#1c5fb8;
--own-bg:#dbe8fb;--no:#a8323e;--no-bg:#fbe9ea;--first-bg:#e8e9ec;--draft:#e0a030;--verify:#5b7fb5;
color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#15181c;--card:#1d2126;--fg:#e4e7ea;--muted:#949ca6;--line:#363c44;
--ok:#6fd39b;--ok-bg:#1d3d2c;--own:#8db9f5;--own-bg:#1e3454;--no:#ee8b94;--no-bg:#3f2226;--first-bg:#31363d;
--draft:#d79a35;--verify:#6f93c9}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.55 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 80px}
h1{font-size:22px;margin:0}h2{font-size:16px;margin:0 0 6px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin-top:16px}
.note{color:var(--muted);font-size:13px;margin:4px 0 12px}section>.note:last-child{margin-bottom:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin-bottom:16px}
.tiles b{display:block;font-size:24px;line-height:1.25}.tiles span{color:var(--muted);font-size:13px}
.split,.bar{display:flex;height:8px;border-radius:4px;overflow:hidden}.bar{height:6px}
i.draft{background:var(--draft)}i.verify{background:var(--verify)}
.dot{display:inline-block;width:9px;height:9px;border-radius:5px;margin:0 5px 0 0}.dot.verify{margin-left:10px}
.answer{white-space:pre-wrap;overflow-wrap:anywhere;font-size:16px;line-height:1.9}
.t{border-radius:3px;padding:2px 0;box-decoration-break:clone;-webkit-box-decoration-break:clone}
.note .t,.note .c{padding:1px 5px}.answer .t{cursor:pointer;box-shadow:inset 1px 0 var(--card)}
.t.ok{background:var(--ok-bg)}.t.own{background:var(--own-bg)}.t.first{background:var(--first-bg)}
.t.ngram{border-bottom:2px dotted var(--ok)}.c.ngram{border-style:dotted}.c.both{border-style:dashed}
.t.hidden{font-size:12px;opacity:.65}.t:hover,.c:hover{outline:1.5px solid currentColor}
details{margin-top:14px;color:var(--muted);font-size:13px}summary{cursor:pointer}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:6px 0 0}
.step{display:grid;grid-template-columns:36px minmax(0,1fr) 76px 130px;gap:12px;align-items:start;padding:7px 6px;
border-top:1px solid var(--line);border-radius:4px}
.step.head{border:0;color:var(--muted);font-size:12px}.step.lit{background:var(--first-bg)}
.n{font-size:12px;color:var(--muted);text-align:right;font-variant-numeric:tabular-nums;line-height:22px;
white-space:nowrap}
.step .n:first-child{text-align:left}.head .n{line-height:1.4;white-space:normal}.time{padding-top:6px}
.time .n{display:block}
.window{overflow-x:auto;padding:0 2px 4px}
.node{display:flex;align-items:flex-start;position:relative}
.c{display:inline-block;flex:none;white-space:pre;font:12.5px/20px ui-monospace,Menlo,Consolas,monospace;padding:0 5px;
border:1px solid var(--line);border-radius:4px;cursor:default}
.c.ok{background:var(--ok-bg);border-color:var(--ok);color:var(--ok)}
.c.own{background:var(--own-bg);border-color:var(--own);color:var(--own)}
.c.no{background:var(--no-bg);border-color:transparent;color:var(--no)}
.c.no s{text-decoration-color:color-mix(in srgb,currentColor 45%,transparent)}
.c.root{color:var(--muted);background:var(--first-bg);border-color:transparent}
.kids{display:flex;flex-direction:column;gap:3px}.kids>.node{padding-left:14px}
.kids>.node::after{content:"";position:absolute;left:0;top:11px;width:14px;border-top:1px solid var(--line)}
.kids>.node::before{content:"";position:absolute;left:6px;top:-3px;bottom:0;border-left:1px solid var(--line)}
.kids>.node:first-child::before{top:11px}.kids>.node:last-child::before{bottom:auto;height:14px}
.kids>.node:only-child::before{display:none}.kids>.node:not(:first-child)::after{left:6px;width:8px}
#tip{position:fixed;display:none;max-width:320px;white-space:pre-wrap;pointer-events:none;background:var(--fg);
color:var(--bg);font-size:12.5px;line-height:1.45;padding:7px 10px;border-radius:6px;z-index:9}
@media (max-width:640px){.step{grid-template-columns:28px minmax(0,1fr) 60px}.time{grid-column:2/4}
.head .n:last-child{display:none}}
"""

_SCRIPT = """
const tip = document.getElementById("tip");
let lit = null;
function row(token) {
  return token && token.dataset.step !== undefined ? document.getElementById("s" + token.dataset.step) : null;
}
document.addEventListener("pointerover", (event) => {
  const token = event.target.closest("[data-tip]");
  if (lit) lit.classList.remove("lit");
  lit = row(token);
  if (lit) lit.classList.add("lit");
  tip.style.display = token ? "block" : "none";
  if (!token) return;
  tip.textContent = token.dataset.tip;
  const box = token.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const below = box.bottom + 8 + size.height < innerHeight;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - size.width - 8)) + "px";
  tip.style.top = (below ? box.bottom + 8 : Math.max(8, box.top - size.height - 8)) + "px";
});
document.addEventListener("click", (event) => {
  const found = row(event.target.closest("[data-step]"));
  if (found) found.scrollIntoView({ behavior: "smooth", block: "center" });
});
document.addEventListener("scroll", () => { tip.style.display = "none"; }, true);
"""
