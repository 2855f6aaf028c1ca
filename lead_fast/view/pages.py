"""HTML of the pages: the run at a glance, the list of its rollouts, a group side by side, a response in full."""

import html
import math
import statistics
import struct
from typing import Any
from urllib.parse import urlencode

import numpy as np

from ..runtime.metric_table import SECTIONS, SHARE, Metric, answers_of
from ..runtime.rollouts import KeptGroup, KeptSample
from .text import (
    COLOURS,
    LEGENDS,
    MOST,
    MOST_TOKENS,
    WHOLE,
    WHOLE_TOKENS,
    Pieces,
    coloured,
    rich,
    shown,
    token_values,
)
from .watched import SORTS, Columns, parse_filter

PAGE = 50  # groups per page of a list
CARDS = 16  # responses side by side
DOTS = 32  # larger groups show a count in the list instead

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #646c76; --line: #e2e5e9; --soft: #f6f7f9; --paper: #fff;
  --link: #0b5cad; --good: #00684c; --bad: #b04a00; --low: 217,95,14; --high: 0,114,178; --much: 140,70,150; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3e8; --faint: #98a1ab; --line: #2c323a; --soft: #1b2026;
  --paper: #12161b; --link: #7ab7f5; --good: #53c7a0; --bad: #f0a15e; --low: 240,140,70; --high: 90,170,235;
  --much: 200,130,215; } .pictures img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
header, main { max-width: 84rem; margin: 0 auto; padding: 0 1.25rem; }
.broad header, .broad main { max-width: none; }
header { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; align-items: baseline; padding-top: 1.1rem;
  padding-bottom: .8rem; border-bottom: 1px solid var(--line); }
header b { font-weight: 600; overflow-wrap: anywhere; } header .state { margin-left: auto; color: var(--faint); }
main { padding-bottom: 4rem; } h1 { font-size: 1.15rem; font-weight: 600; margin: 1.6rem 0 .5rem; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
nav a { margin-right: 1.1rem; white-space: nowrap; } a.here { color: var(--ink); font-weight: 600; }
.faint { color: var(--faint); } .good { color: var(--good); } .bad { color: var(--bad); } .strong { font-weight: 600; }
.wide { overflow-x: auto; }
table.list { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
table.list th { text-align: left; font-weight: 400; color: var(--faint); }
table.list th, table.list td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: baseline; white-space: nowrap; }
table.list td.text { white-space: normal; overflow-wrap: anywhere; width: 60%; min-width: 10rem; }
table.list .number { text-align: right; }
@media (max-width: 40rem) { table.list { font-size: .88rem; } table.list th, table.list td { padding-right: .5rem; } }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 0 2.2rem; }
.numbers div { display: grid; grid-template-columns: 1fr auto 4.4rem; gap: 0 .7rem; padding: .35rem 0;
  align-items: baseline; align-content: start;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
.numbers small { grid-column: 1 / 4; color: var(--faint); line-height: 1.3; }
.numbers svg { width: 4.4rem; height: 1.2rem; align-self: center; }
polyline { fill: none; stroke: var(--link); stroke-width: 1.3; vector-effect: non-scaling-stroke; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
.pictures img { width: 100%; height: auto; } .pictures .wide { grid-column: 1 / -1; }
.dots { letter-spacing: .12em; color: var(--faint); } .dots b { font-weight: 400; color: var(--good); }
form { display: flex; flex-wrap: wrap; gap: .5rem .9rem; align-items: end;
  margin: 1rem 0; } label { display: grid; color: var(--faint); font-size: .82rem; }
input, select, button { font: inherit; font-size: .93rem; color: var(--ink); background: var(--paper);
  border: 1px solid var(--line); border-radius: 4px; padding: 0 .45rem;
  height: 2rem; } input { width: 6.5rem; } form > a { line-height: 2rem; }
button { background: var(--soft); cursor: pointer; } .pager { margin: 1rem 0; }
.problem { margin: .6rem 0 1rem; max-width: 60rem; } .problem, .response { white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem .8rem; min-width: 0; }
.card .top { display: flex; flex-wrap: wrap; gap: 0 .7rem; align-items: baseline; }
.card .top a { margin-left: auto; } .card .answer { overflow-wrap: anywhere; max-height: 5rem; overflow-y: auto; }
.facts { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: .15rem 0 .5rem; padding: 0 0 .5rem; color: var(--faint);
  font-size: .86rem; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
.facts b { font-weight: 500; color: var(--ink); } .card .response { max-height: 30rem; overflow-y: auto; }
.note { color: var(--faint); font-size: .86rem; margin: .4rem 0 0; }
.unseen { font: .75em/1 ui-monospace, monospace; color: var(--bad); border: 1px solid var(--line); border-radius: 3px;
  padding: 0 .2em; } math { font-size: 1.05em; } math .over { border-top: 1px solid; padding-top: .1em; }
  math .boxed { border: 1px solid var(--faint); padding: .15em .3em; }
math[display=block] { overflow-x: auto; overflow-y: hidden; padding: .3em 0; } mtable.left mtd { text-align: left; }
mtable.pairs mtd { padding: .2em .1em; text-align: right; } mtable.pairs mtd:nth-child(even) { text-align: left; }
.tokens { line-height: 1.75; } .tokens span, .note span { border-radius: 2px; }
""" + "\n".join(
    f".{kind}{level} {{ background: rgba(var(--{name}), {0.1 + 0.11 * level:.2f}); }}"
    for kind, name in (("n", "low"), ("p", "high"), ("e", "much"))
    for level in range(1, 6)
)

SCRIPT = """
'use strict';
let mark = document.body.dataset.mark;
const news = document.getElementById('news');
async function renew() {
  const text = await (await fetch(location.href)).text();
  const fresh = new DOMParser().parseFromString(text, 'text/html').querySelector('main');
  for (const image of fresh.querySelectorAll('img')) {  // the old picture is shown until the new one has loaded
    const old = [...document.images].find(i => i.alt === image.alt);
    if (old) { old.src = image.src; image.replaceWith(old); }
  }
  document.querySelector('main').replaceWith(fresh);
  news.hidden = true;
}
async function look() {
  try {
    const state = await (await fetch('/state')).json();
    document.getElementById('state').textContent = state.text;
    if (state.mark !== mark) {
      mark = state.mark;
      if (document.body.dataset.follows) await renew(); else news.hidden = false;
    }
  } catch (e) {
    document.getElementById('state').textContent = 'the server does not answer';
  }
  setTimeout(look, document.hidden ? 30000 : 4000);
}
setTimeout(look, 4000);
news.addEventListener('click', event => { event.preventDefault(); renew(); });
document.addEventListener('keydown', event => {
  if (event.target.matches('input, select') || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  const rel = { ArrowLeft: 'prev', ArrowRight: 'next' }[event.key];
  const link = rel && document.querySelector(`a[rel=${rel}]`);
  if (link) link.click();
});
"""


def page(name: str, state: dict[str, Any], here: str, body: str, *, follows: bool = False, broad: bool = False) -> str:
    """Build a complete document around `body`.

    Args:
        name: of the run.
        state: from Watched.state.
        here: path of the navigation entry that this page belongs to.
        follows: whether the page replaces its content as the run proceeds; otherwise it offers a link.
        broad: whether the page uses the window's full width.
    """
    entries = (("/", "Run"), ("/rollouts", "Rollouts"))
    links = "".join(f'<a href="{path}"{" class=here" if path == here else ""}>{text}</a>' for path, text in entries)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{shown_plain(name)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body data-mark="{html.escape(state["mark"])}"{' data-follows="1"' if follows else ""}{" class=broad" if broad else ""}>
<header><b>{shown(name)}</b><nav>{links}</nav>
<span class="state"><a id="news" href="" hidden>new steps · show</a> <span id="state">{state_text(state)}</span></span>
</header>
<main>{body}</main><script>{SCRIPT}</script></body></html>
"""


def shown_plain(text: str) -> str:
    """Escape text for a title, which cannot contain tags."""
    return html.escape(text.encode("utf-8", "replace").decode())


def state_text(state: dict[str, Any]) -> str:
    """Describe the state of the run in words."""
    of = f" of {state['steps']}" if state["steps"] else ""
    if state["silent_s"] is None:
        return "no record yet"
    if state["ended"]:
        return f"finished, step {state['step']}{of}"
    if state["silent_s"] > state["usual_s"]:
        return f"step {state['step']}{of} · no record for {duration(state['silent_s'])}: has the run stopped?"
    left = f" · about {duration(state['left_s'])} left" if state["left_s"] else ""
    return f"step {state['step']}{of} · last record {duration(state['silent_s'])} ago{left}"


def duration(seconds: float) -> str:
    """Format seconds in a unit that suits their size."""
    s = int(seconds)
    return (
        f"{s} s" if s < 120 else f"{s // 60} min" if s < 7200 else f"{s // 3600} h" if s < 172800 else f"{s // 86400} d"
    )


# --------------------------------------------------------------------------------------------------------------- run


def _percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def _short(x: float) -> str:
    """Format with three digits; below 0.0001 every number here is rounding error."""
    text = f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}" if x == 0 or abs(x) >= 1e-4 else "0.0000"
    return text.replace("-", "−")


NUMBERS = tuple(m for s in SECTIONS if "train" in s.kinds for m in s.metrics if m.title)


def written(m: Metric, x: float) -> str:
    """Format a metric's value for the page."""
    return _percent(x) if m.unit == SHARE else _short(x)


def size(png: bytes) -> tuple[int, int]:
    """Width and height of a picture in pixels."""
    return struct.unpack(">II", png[16:24])


def spans(n: int, most: int = 60) -> list[slice]:
    """Divide the steps of a run into at most `most` parts."""
    parts = min(n, most)
    return [slice(i * n // parts, (i + 1) * n // parts) for i in range(parts)]


def trend(train: list[dict[str, Any]], parts: list[slice], m: Metric) -> str:
    """Draw a number over the run as a line without axes: means over the parts that have it."""
    means = []
    for part in parts:
        values = [v for r in train[part] if isinstance(v := m.of(r), int | float) and math.isfinite(v)]
        means += [statistics.fmean(values)] if values else []
    if len(means) < 2:
        return "<span></span>"
    low, high = min(means), max(means)
    scale = 16 / (high - low) if high - low > 1e-4 else 0.0  # smaller ranges are rounding error
    points = " ".join(
        f"{100 * i / (len(means) - 1):.1f},{18 - scale * (y - low) if scale else 10:.1f}" for i, y in enumerate(means)
    )
    return f'<svg viewBox="0 0 100 20" preserveAspectRatio="none"><polyline points="{points}"></polyline></svg>'


def held_out(evals: list[dict[str, Any]]) -> str:
    """The last evaluation in one sentence, and the change since the first."""
    if not evals:
        return ""
    first, last = evals[0], evals[-1]
    low, high = last.get("pass_at_1_ci") or (None, None)
    between = f" ({100 * low:.1f} to {100 * high:.1f})" if low is not None and high is not None else ""
    facts = [f"<span class=strong>{100 * last['pass_at_1']:.1f} %</span>{between} pass@1 after step {last['step']}"]
    if last is not first:
        facts += [f"{signed(100 * (last['pass_at_1'] - first['pass_at_1']), 1)} points since step {first['step']}"]
    if last.get("length_correct"):
        since = f" (then {first['length_correct']:,.0f})" if last is not first and first.get("length_correct") else ""
        facts += [f"correct responses have {last['length_correct']:,.0f} tokens{since}"]
    answers = answers_of(last)
    if answers and answers["precision"] is not None and last["no_answer_share"]:
        answered, precision = answers["answered_share"], answers["precision"]
        facts += [f"{100 * answered:.1f} % answered, {100 * precision:.1f} % of those correct"]
    return f"<p>Held out: {' · '.join(facts)}</p>"


def healthy(m: Metric, low: float | None, high: float | None) -> str:
    """The healthy range in words; empty if there is none."""
    a, b = ("" if x is None else written(m, x).replace(".0 %", " %") for x in (low, high))
    if not a and not b:
        return ""
    if a and b:
        return f"healthy: {a.removesuffix(' %')} to {b}"
    return f"healthy: {f'from {a}' if a else f'up to {b}' if high else b}"


def overview(state: dict[str, Any], records: list[dict[str, Any]], pictures: dict[str, tuple[str, bytes]]) -> str:
    """Show the run at a glance.

    Args:
        state: from Watched.state.
        records: from Watched.records.
        pictures: name -> (alternative text, PNG).
    """
    train = [r for r in records if r.get("kind") == "train"]
    if not records:
        return "<h1>No record yet</h1><p class=faint>The first step is running; this page updates by itself.</p>"
    if {r.get("kind") for r in records} == {"sft"}:
        return "<h1>A run of lead_fast.sft</h1><p class=faint>It samples no responses: see its TensorBoard logs.</p>"
    cells = ""
    last = train[-1] if train else {}
    parts = spans(len(train))
    for m in NUMBERS:
        value = m.of(last)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            continue
        low, high = m.bounds(train[:-1])
        outside = (low is not None and value < low) or (high is not None and value > high)
        usual = healthy(m, low, high)
        note = f"<span class=bad>{usual}; {m.outside}</span>" if outside else usual
        mark = ' class="bad strong"' if outside else ""
        about = html.escape(f"{m.meaning} {m.remedy}".replace("`", "").strip())
        cells += (
            f'<div title="{about}"><span>{m.title}</span><span{mark}>{written(m, value)}</span>{trend(train, parts, m)}'
            f"<small>{note}</small></div>"
        )
    held = held_out([r for r in records if r.get("kind") == "eval" and r.get("pass_at_1") is not None])
    alerts = "".join(f"<p class=bad>{shown(str(a))}</p>" for a in last.get("alerts") or [])
    images = ""
    for name, (alt, png) in pictures.items():
        width, height = size(png)  # so that the page keeps its height while pictures load
        images += (
            f'<img src="/picture/{name}.png?{html.escape(state["mark"])}" alt="{html.escape(alt)}" width={width} '
            f"height={height}{' class=wide' if width > 2 * height else ''}>"
        )
    title = f"Step {last['step']}" if train else "Before the first step"
    groups = f'<p><a href="/rollouts?step={last["step"]}">Its groups →</a></p>' if train else ""
    return (
        f'<h1>{title}</h1>{held}{alerts}<div class="numbers">{cells}</div>{groups}'
        f'<h1>So far</h1><div class="pictures">{images or "<p class=faint>The pictures are being drawn.</p>"}</div>'
    )


# ---------------------------------------------------------------------------------------------------------- rollouts


def rollouts(columns: Columns, query: dict[str, str], chosen: np.ndarray, matching: int, unreadable: list[str]) -> str:
    """Show the list of groups.

    Args:
        columns: of all groups.
        query: the filters as given, and `page`, counted from 1.
        chosen: positions of the groups that pass the filters, in order.
        matching: number of their responses that pass.
        unreadable: one sentence per file that cannot be read.
    """
    pages = max(1, -(-len(chosen) // PAGE))
    at = min(max(1, int(query["page"]) if query.get("page", "").isdecimal() else 1), pages)
    rows = ""
    ages, gaps, lengths = (columns.mean(name) for name in ("age", "gap", "length"))
    titles: dict[int, list[str]] = {}
    for g in chosen[(at - 1) * PAGE : at * PAGE].tolist():
        step, place = int(columns.step_G[g]), int(columns.place_G[g])
        if step not in titles:
            try:
                titles[step] = columns.indexes[step].titles()
            except ValueError:  # thinned out in the meantime
                titles[step] = []
        text = titles[step][place] if place < len(titles[step]) else "(no longer kept)"
        rows += (
            f"<tr><td class=number>{step}</td><td>{outcome(columns, g)}</td>"
            f'<td class=text><a href="{link(f"/group/{step}/{place}", query)}">{rich(text)}</a></td>'
            f"<td class=number>{lengths[g]:,.0f}</td><td class=number>{ages[g]:.3g}</td>"
            f"<td class=number>{small(float(gaps[g]))}</td></tr>"
        )
    if not len(columns.groups):
        table = (
            "<p class=faint>No rollouts are kept: the run has not finished a step, or metrics.keep_rollouts is 0.</p>"
        )
    elif not rows:
        table = "<p class=faint>No group passes these filters.</p>"
    else:
        table = (
            '<div class="wide"><table class="list"><tr><th class=number>step</th><th>outcome</th><th>problem</th>'
            '<th class=number title="mean tokens">length</th><th class=number title="mean, steps">age</th>'
            '<th class=number title="mean |log-prob by the trainer − by the engine|, nats">gap</th></tr>'
            f"{rows}</table></div>{pager(query, at, pages)}"
        )
    groups = "1 group" if len(chosen) == 1 else f"{len(chosen):,} groups"
    count = (
        f"{groups}, {matching:,} responses of {len(columns.responses):,} kept"
        " · <span class=good>●</span> correct ○ wrong ◌ truncated"
    )
    broken = "".join(f"<p class=bad>{shown(s)}</p>" for s in unreadable)
    said = f"<p class=faint>{count}</p>" if len(columns.groups) else ""
    return f"<h1>Rollouts</h1>{form(query)}{said}{broken}{table}"


def outcome(columns: Columns, g: int) -> str:
    """A dot per response: filled if it is correct, dotted if it is truncated; a count if there are many."""
    group = columns.groups[g]
    n, correct = int(group["responses"]), int(group["correct"])
    rows = columns.responses[int(group["first"]) : int(group["first"]) + n]
    words = f"{correct} of {n} correct, {int(rows['truncated'].sum())} truncated"
    if n > DOTS:
        return f'<span title="{words}">{correct} / {n}</span>'
    marks = zip(rows["correct"].tolist(), rows["truncated"].tolist(), strict=True)
    dots = "".join("<b>●</b>" if right else "◌" if cut_off else "○" for right, cut_off in marks)
    return f'<span class="dots" title="{words}" aria-label="{words}">{dots}</span>'


def form(query: dict[str, str]) -> str:
    def box(name: str, label: str, hint: str) -> str:
        value = html.escape(query.get(name, "")[:40])
        return f'<label>{label}<input name="{name}" value="{value}" placeholder="{hint}" autocomplete="off"></label>'

    def choice(name: str, label: str, options: dict[str, str]) -> str:
        items = "".join(
            f'<option value="{value}"{" selected" if query.get(name, "") == value else ""}>{text}</option>'
            for value, text in options.items()
        )
        return f'<label>{label}<select name="{name}">{items}</select></label>'

    either = {"": "either", "yes": "yes", "no": "no"}
    return (
        '<form action="/rollouts">'
        + box("step", "step", "10-20")
        + box("solve", "solve rate, %", "1-99")
        + choice("correct", "correct", either)
        + choice("truncated", "truncated", either)
        + box("age", "age, steps", "0-4")
        + choice("sort", "order", SORTS)
        + '<button>Show</button> <a href="/rollouts">all</a></form>'
    )


FILTERS = ("step", "solve", "correct", "truncated", "age", "sort")


def link(path: str, query: dict[str, str], **more: str | int) -> str:
    """Build an address that keeps the list's filters, escaped for an attribute; empty values are left out."""
    kept = {k: query[k] for k in FILTERS if query.get(k)} | {k: v for k, v in more.items() if v != ""}
    return html.escape(path + (f"?{urlencode(kept, errors='replace')}" if kept else ""))


def pager(query: dict[str, str], at: int, pages: int) -> str:
    def step(to: int, rel: str, text: str) -> str:
        return f'<a rel={rel} href="{link("/rollouts", query, page=to)}">{text}</a> ' if 1 <= to <= pages else ""

    before, after = step(at - 1, "prev", "← previous"), step(at + 1, "next", "next →")
    return f'<p class="pager faint">{before} page {at} of {pages:,} {after}</p>'


# ------------------------------------------------------------------------------------------------------------- group


def group(
    columns: Columns,
    step: int,
    place: int,
    kept: KeptGroup,
    query: dict[str, str],
    pieces: Pieces | None,
    first: int = 0,
) -> str:
    """Show a group's responses side by side.

    Args:
        step, place: which group.
        kept: its texts.
        query: the list's filters, from which the neighbours follow, and `colour`: a key of COLOURS, or empty.
        pieces: of the run's tokenizer; None if there is none.
        first: index of the first response to show.
    """
    colour = query.get("colour", "")
    index = columns.indexes[step]
    rows = index.responses[index.responses["group"] == place]
    n, correct = len(rows), int(rows["correct"].sum())
    there = f"/group/{step}/{place}"
    colours = {"": "nothing", **COLOURS}.items()
    links = [
        f'<a href="{link(there, query, colour=c)}"{" class=here" if c == colour else ""}>{t}</a>' for c, t in colours
    ]
    facts = [f"{correct} of {n} correct"]
    facts += [f"difficulty {kept.difficulty:g}"] if kept.difficulty is not None else []
    shown_samples = range(first, min(first + CARDS, n))
    cards = "".join(card(step, place, i, rows[i], kept.samples[i], query, pieces) for i in shown_samples)
    more = [
        f'<a href="{link(there, query, colour=colour, first=at)}"{" class=here" if at == first else ""}>'
        f"{at + 1}–{min(at + CARDS, n)}</a>"
        for at in range(0, n, CARDS)
    ]
    legend = f'<p class="note">{LEGENDS[colour]}{largest(kept.samples, colour)}</p>' if colour else ""
    return (
        f"<h1>Step {step}, group {place + 1} of {len(index.groups)}</h1>"
        f"{neighbours(columns, step, place, query)}"
        f'<div class="problem">{rich(kept.problem[:MOST])}{cut(kept.problem, MOST)}</div>'
        f"<p>Reference <span class=strong>{answer(kept.reference)}</span> "
        f"<span class=faint>· {' · '.join(facts)}</span></p>"
        f"<nav>Tokens coloured by: {' '.join(links)}</nav>{legend}"
        + (f'<nav class="pager">{" ".join(more)}</nav>' if n > CARDS else "<p></p>")
        + f'<div class="cards">{cards}</div>'
    )


def neighbours(columns: Columns, step: int, place: int, query: dict[str, str]) -> str:
    """Links to the previous and next group of the filtered list, and to that list."""
    chosen, _ = columns.select(parse_filter(query))
    here = np.flatnonzero((columns.step_G[chosen] == step) & (columns.place_G[chosen] == place))
    if not len(here):  # the address was typed by hand
        return f'<nav><a href="{link("/rollouts", query)}">the list</a></nav>'
    at, colour = int(here[0]), query.get("colour", "")

    def to(i: int, rel: str, text: str) -> str:
        if not 0 <= i < len(chosen):
            return ""
        path = f"/group/{columns.step_G[chosen[i]]}/{columns.place_G[chosen[i]]}"
        return f'<a rel={rel} href="{link(path, query, colour=colour)}">{text}</a>'

    back = f'<a href="{link("/rollouts", query, page=at // PAGE + 1)}">the list</a>'
    counted = f'<span class="faint">{at + 1:,} of {len(chosen):,}</span>'
    return f"<nav>{to(at - 1, 'prev', '← previous')} {to(at + 1, 'next', 'next →')} {back} {counted}</nav>"


def largest(samples: list[KeptSample], colour: str) -> str:
    """State the largest value among a group's tokens, which explains why none is coloured."""
    values = [v for s in samples if (v := token_values(s, colour)) is not None]
    ends = [x for v in values for x in (v[np.isfinite(v)].min(initial=np.inf), v[np.isfinite(v)].max(initial=-np.inf))]
    ends = [x for x in ends if math.isfinite(x)]
    if not ends:
        return ""
    low, high = min(ends), max(ends)
    if colour == "weight":
        return f"; here from {low:.4g} to {high:.4g}"
    return f"; the largest here is {small(max(abs(low), abs(high)))}"


def answer(text: str | None) -> str:
    """Format an answer or reference, as mathematics if possible."""
    if text is None:
        return '<span class="faint">none</span>'
    return (
        rich(f"${text}$")
        if len(text) < 200 and "$" not in text and "\n" not in text and text.strip() == text and text
        else shown(text[:400]) + cut(text, 400)
    )


def cut(text: str, most: int) -> str:
    return f'<span class="faint"> … {len(text) - most:,} more characters</span>' if len(text) > most else ""


def signed(x: float, digits: int = 2) -> str:
    return "–" if math.isnan(x) else f"{x:+.{digits}f}".replace("-", "−")


def small(x: float) -> str:
    """Format a mean gap in nats; below 0.0001 the digits are rounding error."""
    return "–" if math.isnan(x) else f"{x:.2g}" if abs(x) >= 1e-4 or x == 0 else "0.0000"


def facts_of(row: np.void, sample: KeptSample) -> str:
    """One line with reward, z, advantage and so on."""
    fields = sample.fields
    facts = {
        "reward": signed(float(row["reward"])),
        "z": signed(float(row["z"])),
        "advantage": signed(float(row["advantage"])),
    }
    facts |= {"tokens": f"{int(row['length']):,}", "age": str(int(row["age"]))}
    facts["gap"] = "not trained on" if sample.gap is None else small(float(row["gap"]))
    facts |= {
        ("function" if k == "reward" else shown(k)): f"{v:.3g}" for k, v in fields["terms"].items() if v is not None
    }
    return "".join(f"<span>{k} <b>{v}</b></span>" for k, v in facts.items())


def card(
    step: int, place: int, i: int, row: np.void, sample: KeptSample, query: dict[str, str], pieces: Pieces | None
) -> str:
    """Show one response with its verdict and numbers."""
    fields, colour = sample.fields, query.get("colour", "")
    verdict = "<span class='good strong'>correct</span>" if row["correct"] else "<span class='bad strong'>wrong</span>"
    marks = [fields["finish_reason"]] if row["truncated"] else []
    marks += ["degenerate"] if fields["degenerate"] else []
    marks += ["reward function failed"] if fields["failed"] else []
    cut_short = f'<span class="bad">{shown("truncated: " + ", ".join(marks))}</span>' if marks else ""
    in_full = link(f"/response/{step}/{place}/{i}", query, colour=colour)
    return (
        f'<div class="card"><div class="top">{verdict}{cut_short}<a class="faint" href="{in_full}">in full</a></div>'
        f'<div class="answer">answer {answer(fields["extracted"])}</div>'
        f'<div class="facts">{facts_of(row, sample)}</div>'
        f"{body(sample, colour, pieces, MOST, MOST_TOKENS)}</div>"
    )


def body(sample: KeptSample, colour: str, pieces: Pieces | None, most: int, most_tokens: int, start: int = 0) -> str:
    """The response's text, or its tokens in colour, beginning at `start` (characters or tokens)."""
    text, note = sample.fields["text"], ""
    if colour:
        values = token_values(sample, colour)
        if values is None:
            note = "Not trained on in its step (its advantage is 0), so the trainer computed nothing for its tokens."
        elif pieces is None:
            note = "The run keeps no tokenizer.json, so its tokens cannot be shown one by one."
        else:
            ids = sample.token_ids[start : start + most_tokens]
            left = len(sample.token_ids) - start - len(ids)
            more = f'<p class="note">{left:,} more tokens</p>' if left > 0 else ""
            tokens = coloured(pieces.of(ids.tolist()), values[start : start + most_tokens], colour)
            return f'<div class="response tokens">{tokens}</div>{more}'
    left = len(text) - start - most
    more = f'<p class="note">{left:,} more characters</p>' if left > 0 else ""
    said = f'<p class="note">{note}</p>' if note else ""
    return f'{said}<div class="response">{rich(text[start : start + most])}</div>{more}'


def response(
    columns: Columns,
    step: int,
    place: int,
    i: int,
    kept: KeptGroup,
    query: dict[str, str],
    pieces: Pieces | None,
    start: int,
) -> str:
    """Show one response on its own page, in parts if it is very long."""
    index, colour = columns.indexes[step], query.get("colour", "")
    rows = index.responses[index.responses["group"] == place]
    row, sample = rows[i], kept.samples[i]
    of_tokens = bool(colour) and sample.gap is not None and pieces is not None
    length, size = (len(sample.token_ids), WHOLE_TOKENS) if of_tokens else (len(sample.fields["text"]), WHOLE)
    there = f"/response/{step}/{place}/{i}"
    starts = {at: link(there, query, colour=colour, **{"from": at}) for at in range(0, length, size)}
    parts = [f'<a href="{to}"{" class=here" if at == start else ""}>{at:,}</a>' for at, to in starts.items()]
    verdict = "<span class='good strong'>correct</span>" if row["correct"] else "<span class='bad strong'>wrong</span>"
    links = [f'<a href="{link(there, query, colour=c)}"{" class=here" if c == colour else ""}>{t}</a>'
             for c, t in {"": "nothing", **COLOURS}.items()]  # fmt: skip
    near = [
        f'<a rel={rel} href="{link(f"/response/{step}/{place}/{to}", query, colour=colour)}">{text}</a>'
        for to, rel, text in ((i - 1, "prev", "← previous"), (i + 1, "next", "next →"))
        if 0 <= to < len(rows)
    ]
    near += [f'<a href="{link(f"/group/{step}/{place}", query, colour=colour)}">the group</a>']
    return (
        f"<h1>Step {step}, group {place + 1}, response {i + 1}</h1><nav>{' '.join(near)}</nav>"
        f"<p>{verdict} · answer {answer(sample.fields['extracted'])} · reference {answer(kept.reference)}</p>"
        f'<div class="facts">{facts_of(row, sample)}</div><nav>Tokens coloured by: {" ".join(links)}</nav>'
        + (f'<p class="note">{LEGENDS[colour]}</p>' if colour else "")
        + (f"<nav class=pager>from {' '.join(parts[:400])}</nav>" if len(parts) > 1 else "<p></p>")
        + body(sample, colour, pieces, WHOLE, WHOLE_TOKENS, start)
    )
