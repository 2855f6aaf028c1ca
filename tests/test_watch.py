"""Test the rollouts that a run keeps and the page that shows them: limits, filters, escaping, access, a browser."""

import fcntl
import html.parser
import http.client
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hostile
import numpy as np
import pytest
from jobs import records

from lead_fast.records import Batch, Group, Problem, Response, Sample, Score
from lead_fast.report import main, pictures
from lead_fast.runtime.metric_table import Metric
from lead_fast.runtime.metrics import Metrics
from lead_fast.runtime.rollouts import Rollouts, TokenValues, length_z, read_step, step_files, to_drop
from lead_fast.view import pages, text
from lead_fast.view.mathml import mathml
from lead_fast.view.server import Server, Site, allowed_host, check_address, make_server
from lead_fast.view.watched import QUIET_S, Filter, Watched, parse_filter, parse_range

pytestmark = pytest.mark.quick

ATTACKS = [
    "<script>document.title='broken'</script>",
    "</pre></div><img src=x onerror=\"document.title='broken'\">",
    "$\\text{<script>document.title='broken'</script>}$",
    "\\(\\frac{<b>}{'\">}\\)",
    "\u202eright to left\u2066 \ud800 \x00\x1b[2J \ufeff\u2028",
    "&lt;b&gt; &amp; </title></style></script><!--",
    "javascript:alert(1) \" onmouseover='alert(1)' x=\"",
]


def sample(words: str, *, correct: bool = False, n: int = 3, version: int = 0, reason: str = "stop") -> Sample:
    """Make a response of n tokens."""
    response = Response(list(range(n)), [-0.5] * n, reason, words, version)
    return Sample(response, Score(correct, words[:300], reason != "stop", False))


def add(store: Rollouts, step: int, groups: list[Group], values: TokenValues | None = None) -> str | None:
    batch = Batch(groups)
    n = len(batch.samples)
    rewards = [1.0 if s.score.correct else -1.0 for s in batch.samples]
    return store.add(step, batch, rewards, [0.25 * i for i in range(n)], 1e-6, values or no_values())


def no_values() -> TokenValues:
    return TokenValues(*(np.empty(0, d) for d in ("i4", "i4", "f2", "f2")))


def problem(words: str, reference: str = "1") -> Problem:
    return Problem(words[:20], words, reference, 2.0)


def plain_group(step: int, i: int, correct: int, size: int = 4, n: int = 3) -> Group:
    samples = [sample(f"step {step} group {i} response {k}", correct=k < correct, n=n + k) for k in range(size)]
    return Group(problem(f"problem {i} of step {step}"), [1, 2], samples)


# -------------------------------------------------------------------------------------------------------------- store


def test_what_is_kept_is_what_was_sampled(tmp_path):
    texts = [*ATTACKS, "x" * 1_000_000, ""]
    groups = [Group(problem(t, t), [1], [sample(t), sample(t, correct=True, n=5, reason="length")]) for t in texts]
    values = TokenValues(
        np.array([3, 3, 3, 3, 3, 0, 0, 0], "i4"),  # rows of two ranks, out of order
        np.array([9, 8, 7, 6, 5, 4, 3, 2], "i4"),
        np.arange(8).astype("f2"),
        (np.arange(8) / 8).astype("f2"),
    )
    store = Rollouts(tmp_path, 10**8)
    assert add(store, 7, groups, values) is None
    index = read_step(7, step_files(tmp_path / "rollouts")[7])
    assert len(index.groups) == len(texts) and len(index.responses) == 2 * len(texts)
    assert index.titles()[0] == ATTACKS[0]
    for i, t in enumerate(texts):
        kept = index.group(i)
        assert kept.problem == t and kept.reference == t and [s.fields["text"] for s in kept.samples] == [t, t]
        assert [s.token_ids.tolist() for s in kept.samples] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    first, second = index.group(0).samples, index.group(1).samples
    assert first[0].gap.tolist() == [7, 6, 5] and second[1].gap.tolist() == [4, 3, 2, 1, 0]
    assert second[1].entropy.tolist() == [0.5, 0.375, 0.25, 0.125, 0] and first[1].gap is None
    assert index.responses["gap"][0] == 6 and math.isnan(index.responses["gap"][1])
    assert index.responses["age"].tolist() == [6] * len(index.responses)
    assert index.responses["truncated"].tolist() == [False, True] * len(texts)


def test_z_is_over_the_correct_responses_alone():
    z = length_z(np.array([True, True, False, True]), np.array([10, 20, 999, 30]), 0.0)
    assert z[[0, 1, 3]].tolist() == [-1, 0, 1] and math.isnan(z[2])
    assert length_z(np.array([False, True]), np.array([5, 9]), 1e-6)[1] == 0


def test_the_limit_holds_at_every_step_and_history_is_thinned_not_cut_off(tmp_path):
    store = Rollouts(tmp_path, 1)
    assert "raise metrics.keep_rollouts" in add(store, 1, [plain_group(1, 0, 2)])  # a single step exceeds the limit
    assert not step_files(tmp_path / "rollouts")
    add(Rollouts(tmp_path, 10**6), 1, [plain_group(1, 0, 2)])
    size = step_files(tmp_path / "rollouts")[1].stat().st_size
    store = Rollouts(tmp_path, 12 * size + size // 2)
    for step in range(1, 201):
        assert add(store, step, [plain_group(step, 0, 2)]) is None
        files = step_files(tmp_path / "rollouts")
        assert sum(p.stat().st_size for p in files.values()) <= store.limit_bytes and step in files
    kept = list(files)
    gaps = np.diff(kept)
    assert kept[0] == 1 and len(kept) >= 9 and (gaps[-2:] <= 4).all() and gaps.max() == gaps[:2].max() > 30
    assert to_drop([3, 9]) == 3
    assert add(Rollouts(tmp_path / "off", 0), 1, [plain_group(1, 0, 2)]) is None and not (tmp_path / "off").exists()


def test_a_resumed_run_writes_the_same_files_again(tmp_path):
    store = Rollouts(tmp_path, 10**8)
    for step in range(1, 7):
        add(store, step, [plain_group(step, i, 2) for i in range(3)])
    before = {n: p.read_bytes() for n, p in step_files(tmp_path / "rollouts").items()}
    (tmp_path / "rollouts" / "step-00000007.partial").write_bytes(b"half")
    again = Rollouts(tmp_path, 10**8)
    again.truncate_after(4)
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == [f"step-{n:08d}.bin" for n in range(1, 5)]
    for step in (5, 6):
        add(again, step, [plain_group(step, i, 2) for i in range(3)])
    assert before == {n: p.read_bytes() for n, p in step_files(tmp_path / "rollouts").items()}


def test_a_full_disk_ends_no_run_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "the run continues" in add(Rollouts(tmp_path, 10**8), 1, [plain_group(1, 0, 2)])
    assert [*(tmp_path / "rollouts").iterdir()] == []


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:30], lambda b: b[:-40], lambda b: b"x" * 50 + b[50:], lambda b: b[:-9] + b"x" * 9, lambda b: b""],
)
def test_a_damaged_file_is_named_and_the_others_are_shown(tmp_path, damage):
    for step in (1, 2):
        add(Rollouts(tmp_path, 10**8), step, [plain_group(step, 0, 2)])
    path = step_files(tmp_path / "rollouts")[2]
    path.write_bytes(damage(path.read_bytes()))
    watched = Watched(tmp_path)
    columns = watched.columns()
    if 2 in columns.indexes:  # all its columns are complete
        with pytest.raises(ValueError, match="is (incomplete|damaged .*): remove it"):
            columns.indexes[2].group(0)
    else:
        assert "step-00000002.bin holds no readable rollouts" in watched.unreadable[0]
    assert columns.indexes[1].group(0).problem == "problem 0 of step 1"


def test_a_real_run_keeps_every_step_with_the_numbers_of_its_metrics(tiny_run):
    columns, alpha = Watched(tiny_run).columns(), Watched(tiny_run).config()["advantage"]["alpha"]
    train = records(tiny_run, "train")
    assert list(columns.indexes) == [r["step"] for r in train]
    compared = 0
    for r in train:
        index = columns.indexes[r["step"]]
        rows, groups = index.responses, [index.group(i) for i in range(len(index.groups))]
        samples = [s for g in groups for s in g.samples]
        assert rows["correct"].mean() == r["accuracy"] and rows["length"].sum() == r["response_tokens"]
        assert rows["reward"].mean() == pytest.approx(r["reward_mean"], abs=1e-6) and (rows["age"] == 0).all()
        right = rows[rows["correct"]]  # the kernel's rewards are exp(-alpha z), with the page's z
        assert np.allclose(right["reward"], np.exp(-alpha * right["z"]), rtol=1e-5)
        trained = [s for s in samples if s.gap is not None]
        assert len(samples) - len(trained) == r["sequences_skipped"]
        assert [s.gap is not None for s in samples] == (rows["advantage"] != 0).tolist()
        if trained:
            entropy = np.concatenate([s.entropy for s in trained]).astype(float).mean()
            gap = np.abs(np.concatenate([s.gap for s in trained]).astype(float))
            assert entropy == pytest.approx(r["entropy"], rel=2e-3)
            assert gap.mean() == pytest.approx(r["logprob_diff_mean"], rel=0.1, abs=1e-7)
            compared += 1
        pieces = text.Pieces(str(tiny_run / "rollouts" / "tokenizer.json"))
        for s in samples[:4]:
            assert "".join(pieces.of(s.token_ids.tolist())).removesuffix("<|end|>") == s.fields["text"]
    assert compared >= 2


# ------------------------------------------------------------------------------------------------------------ filters


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Watched:
    folder = tmp_path_factory.mktemp("filters")
    store = Rollouts(folder, 10**8)
    for step in range(1, 31):
        version = step - 1 - (step % 3)
        groups = [plain_group(step, i, i, n=step) for i in range(5)]
        late = [sample("cut", n=2, version=version, reason="length"), *(sample("s", n=2) for _ in range(3))]
        add(store, step, [*groups, Group(problem("late"), [1], late)])
    return Watched(folder)


@pytest.mark.parametrize(
    "query, groups, responses",
    [
        ({}, 180, 720),
        ({"step": "7"}, 6, 24),
        ({"step": "29-"}, 12, 48),
        ({"step": "-2"}, 12, 48),
        ({"solve": "1-99"}, 90, 360),
        ({"solve": "25"}, 30, 120),
        ({"correct": "yes"}, 120, 300),
        ({"correct": "yes", "solve": "100"}, 30, 120),
        ({"truncated": "yes"}, 30, 30),
        ({"truncated": "yes", "age": "2"}, 10, 10),
        ({"truncated": "yes", "correct": "yes"}, 0, 0),
    ],
    ids=str,
)
def test_filters(watched, query, groups, responses):
    columns = watched.columns()
    chosen, matching = columns.select(parse_filter(query))
    assert (len(chosen), matching) == (groups, responses)
    assert list(columns.step_G[chosen]) == sorted(columns.step_G[chosen], reverse=True)


def test_order_and_paging_show_every_group_once(watched):
    columns = watched.columns()
    chosen, n = columns.select(Filter(sort="longest"))
    assert columns.step_G[chosen[0]] == 30 and (np.diff(columns.mean("length")[chosen]) <= 0).all()
    seen = []
    for page in range(1, 6):
        shown = pages.rollouts(columns, {"page": str(page), "sort": "longest"}, chosen, n, [])
        seen += re.findall(r'href="(/group/\d+/\d+)\?sort=longest"', shown)
        assert f"page {min(page, 4)} of 4" in shown
    assert len(seen[:180]) == len(set(seen[:180])) == 180 and seen[180:] == seen[150:180]  # page 5 is the last page
    assert "sort=longest&amp;page=3" in pages.rollouts(columns, {"page": "2", "sort": "longest"}, chosen, n, [])


@pytest.mark.parametrize(
    "query, says",
    [({"step": "a"}, "step is 'a'"), ({"age": "1--2"}, "age is"), ({"solve": "-"}, "solve is"), ({"sort": "x"}, "sort"),
     ({"correct": "maybe"}, "correct is 'maybe': give yes or no"),
     ({"step": "٣"}, "step is"), ({"step": "9" * 99}, "step")],
)  # fmt: skip
def test_a_filter_that_cannot_be_read_gets_one_sentence(query, says):
    with pytest.raises(ValueError) as e:
        parse_filter(query)
    assert says in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 200
    assert parse_range("step", " ").holds(np.array([1, 2])).all()


def test_a_groups_neighbours_are_those_of_the_filtered_list(watched):
    columns = watched.columns()
    query = {"solve": "1-99", "sort": "oldest", "colour": "gap"}
    chosen, _ = columns.select(parse_filter(query))
    step, place = int(columns.step_G[chosen[60]]), int(columns.place_G[chosen[60]])
    out = pages.neighbours(columns, step, place, query)
    for at, rel in ((59, "prev"), (61, "next")):
        path = f"/group/{columns.step_G[chosen[at]]}/{columns.place_G[chosen[at]]}"
        assert f'<a rel={rel} href="{path}?solve=1-99&amp;sort=oldest&amp;colour=gap">' in out
    assert 'href="/rollouts?solve=1-99&amp;sort=oldest&amp;page=2"' in out and "61 of 90" in out
    assert 'href="/rollouts?solve=100"' in pages.neighbours(columns, step, place, {"solve": "100"})
    first = pages.neighbours(columns, int(columns.step_G[chosen[0]]), int(columns.place_G[chosen[0]]), query)
    assert "rel=prev" not in first and "rel=next" in first


def test_the_list_tells_correct_wrong_and_truncated_apart(watched):
    columns = watched.columns()
    place = int(np.flatnonzero(columns.responses["truncated"])[0])
    out = pages.outcome(columns, int(columns.responses["group"][place]))
    assert ">◌○○○</span>" in out and "0 of 4 correct, 1 truncated" in out
    assert ">" + "<b>●</b>" * 2 + "○○</span>" in pages.outcome(columns, 2)


def test_files_are_read_once_and_again_when_they_change(tmp_path, monkeypatch):
    store = Rollouts(tmp_path, 10**8)
    add(store, 1, [plain_group(1, 0, 1)])
    reader = Watched(tmp_path)
    first = reader.columns()
    assert reader.columns() is first
    add(store, 2, [plain_group(2, 0, 1)])
    assert list(reader.columns().indexes) == [1, 2]
    add(store, 2, [plain_group(2, 0, 1), plain_group(2, 1, 1)])  # after a resume
    assert len(reader.columns().groups) == 3
    store.truncate_after(1)
    assert list(reader.columns().indexes) == [1]


# --------------------------------------------------------------------------------------------------------------- text


MATHML = {"math", "mrow", "mi", "mn", "mo", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup", "munder", "mover",
          "munderover", "mtable", "mtr", "mtd", "mtext", "mspace"}  # fmt: skip
ATTRIBUTES = {"class", "mathvariant", "stretchy", "fence", "display", "width", "form", "accent", "linethickness",
              "lspace", "rspace"}  # fmt: skip
HTML = {"html", "head", "meta", "title", "style", "body", "header", "nav", "b", "a", "span", "main", "h1", "p", "div",
        "i", "small", "img", "script", "form", "label", "input", "select", "option", "button", "table", "tr", "th",
        "td", "svg", "polyline"}  # fmt: skip


class Tags(html.parser.HTMLParser):
    """Parser that collects tags with attributes and checks that they are balanced."""

    def __init__(self, page: str):
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "input", "mspace"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_hostile_text_becomes_text_and_nothing_else():
    corpus = [*ATTACKS, *(t for t, _ in hostile.cases(300, "m"))]
    rendered = 0
    for t in corpus:
        for wrapped in (t, f"${t}$", f"\\[{t}\\]"):
            out = text.rich(wrapped[: text.MOST])
            tags = Tags(out)
            assert set(tags.names) <= MATHML | {"i"}, t[:80]
            assert {k for k, _ in tags.attributes} <= ATTRIBUTES
            assert not text.UNSEEN.search(out)
            out.encode()
            rendered += "math" in tags.names
    assert rendered > 100


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("x^2", "<msup><mi>x</mi><mrow><mn>2</mn></mrow></msup>"),
        (r"\frac{1}{2}", "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac>"),
        (r"\sqrt[3]{x}", "<mroot><mrow><mi>x</mi></mrow><mrow><mn>3</mn></mrow></mroot>"),
        (r"\mathbb{R}", '<mi mathvariant="normal">ℝ</mi>'),
        (r"\mathbf{a}", '<mi mathvariant="normal">𝐚</mi>'),
        (r"\boxed{46}", '<mrow class="boxed"><mrow><mn>46</mn></mrow></mrow>'),
        (r"a \le b", '<mo stretchy="false">≤</mo>'),
        (r"\text{if } x", "<mtext>if\u00a0</mtext>"),
        (r"\left( x \right)", '<mo fence="true" stretchy="true">(</mo>'),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "<mtr><mtd><mrow><mn>3</mn></mrow></mtd>"),
        (r"\begin{align}a&=b\\c&=d\end{align}", '<mtable class="pairs"><mtr><mtd><mrow><mi>a</mi></mrow></mtd>'),
        (r"1 \pmod{24}", "<mtext>\u00a0(mod\u00a0</mtext><mrow><mn>24</mn></mrow><mtext>)</mtext>"),
        (r"a \not\equiv b", '<mo stretchy="false">≡\u0338</mo>'),
        (r"x \tag{1}", "<mtext>\u2003(1)</mtext>"),
        ("x_1^2", "<msubsup><mi>x</mi><mn>1</mn><mrow><mn>2</mn></mrow></msubsup>"),
        ("1<2", "&lt;"),
        ("f'(x)", "<mo>′</mo>"),
    ],
)
def test_mathematics_becomes_mathml(source, wanted):
    out = mathml(source)
    assert out is not None and wanted in out
    Tags(out)


@pytest.mark.parametrize(
    "source",
    [r"\unknown{x}", "x^{", "a^b^c", "}", r"\frac{1}", "{" * 99 + "}" * 99, "x" * 4000, r"\begin{tikz}\end{tikz}", "$",
     r"\left( x", r"\text{a \foo b}", r"\begin{pmatrix}1\end{bmatrix}", "\\"],
)  # fmt: skip
def test_what_is_not_known_is_shown_as_source(source):
    assert mathml(source) is None
    assert source == "\\" or "<math" not in text.rich(f"\\({source}\\)")


def test_prices_and_program_text_are_not_mathematics():
    for words in ("costs $5 and $7 more", "a $ b $ c", r"\$5$", "US$3", "$x\n y$"):
        assert "<math" not in text.rich(words), words
    assert text.rich("so $x=1$, and \\boxed{2}").count("<math") == 2
    assert text.rich("so\n\\begin{align*}\na &= b\n\\end{align*}\nand").count('<math display="block"') == 1
    began = time.process_time()
    text.rich("\\begin{align}" * (text.WHOLE // 13))  # many environments that never end
    assert time.process_time() - began < 2


def test_tokens_are_coloured_by_what_was_computed_and_the_absence_is_said(tmp_path):
    values = np.array([0.0, 0.2, -2.0, math.nan], "f4")
    out = text.coloured(["<a>", "b", "c", "d"], values, "gap")
    assert (
        '<span title="0">&lt;a&gt;</span>' in out and 'class="p3" title="0.2"' in out and 'class="n5" title="-2"' in out
    )
    assert 'class="e5"' in text.coloured(["x"], np.array([3.0]), "entropy")
    assert 'class="n4"' in text.coloured(["x"], np.array([0.4]), "weight")
    store = Rollouts(tmp_path, 10**8)
    add(
        store,
        1,
        [plain_group(1, 0, 2)],
        TokenValues(*(np.zeros(3, d) for d in ("i4", "i4")), *[np.full(3, np.nan, "f2")] * 2),
    )
    index = Watched(tmp_path).columns()
    shown = pages.group(index, 1, 0, index.indexes[1].group(0), {"colour": "entropy"}, None)
    assert shown.count("Not trained on in its step") == shown.count("gap <b>not trained on") == 3
    assert shown.count("gap <b>–") == 1 and shown.count("keeps no tokenizer.json") == 1  # once, for a skipped update


# ------------------------------------------------------------------------------------------------------------- server


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Server]:
    """A served run full of hostile text, in a folder with a hostile name."""
    folder = tmp_path_factory.mktemp("run") / "<script>a'b"
    m = Metrics(folder, total_steps=2, tensorboard=False)
    numbers = {"accuracy": 0.95, "reward_mean": 0.0, "seconds": {"rollout": 1.0}, "solve_rate_histogram": [1, 2, 1]}
    for step in (1, 2):
        m.train(step, numbers | {"alerts": [ATTACKS[0]], "grad_norm": 100.0 if step == 2 else 1.0})
    m.close()
    (folder / "secret.txt").write_text("secret")
    store = Rollouts(folder, 10**9)
    long = "y" * 1_000_000
    groups = [Group(problem(t, t), [1], [sample(t), sample(t, correct=True)]) for t in [*ATTACKS, long]]
    add(store, 1, groups)
    good = r"Let $\frac{a}{b}=\sqrt{2}$, then \[\sum_{k=1}^{n} k = \frac{n(n+1)}{2}\] and \boxed{46}."
    add(store, 2, [Group(problem("What is $x^2$?", "46"), [1], [sample(good, correct=True), sample(ATTACKS[0])] * 20)])
    server = make_server(folder, lambda: pictures(folder), port=0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server: Server, path: str, method: str = "GET", host: str | None = None, body: bytes | None = None):
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body=body, headers={"Host": host if host is not None else f"127.0.0.1:{port}"})
    reply = connection.getresponse()
    data = reply.read()
    connection.close()
    return reply, data


PATHS = ["/", "/rollouts", *(f"/group/1/{i}" for i in range(8)), "/group/2/0?first=16", "/group/2/0?colour=gap",
         "/response/1/0/1", "/response/1/7/0?from=60000", "/rollouts?step=<script>&solve=1-2",
         "/rollouts?correct=yes&page=99&x=<b>"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_pages_are_balanced_escaped_and_bounded(site, path):
    reply, data = ask(site, path.replace("<", "%3C").replace(">", "%3E"))
    if "step=<" in path:
        assert reply.status == 400 and reply.getheader("Content-Type", "").startswith("text/plain")
        return
    assert reply.status == 200 and len(data) < 600_000
    tags = Tags(data.decode())
    assert set(tags.names) <= HTML | MATHML and tags.names.count("script") == tags.names.count("style") == 1
    assert not [k for k, _ in tags.attributes if k.startswith("on") or k == "style"]
    links = [v or "" for k, v in tags.attributes if k in ("href", "src", "action")]
    assert all(not v or re.match(r"/(?:[a-z]|$)", v) for v in links)
    policy = reply.getheader("Content-Security-Policy", "")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert (reply.getheader("X-Content-Type-Options"), reply.getheader("Cache-Control")) == ("nosniff", "no-store")


def test_a_group_is_shown_side_by_side_in_parts(site):
    page = ask(site, "/group/2/0")[1].decode()
    assert page.count('class="card"') == 16 and "first=32" in page and "40" in page
    for said in (
        "reward <b>+1.00</b>",
        "advantage <b>+0.25</b>",
        "z <b>+0.00</b>",
        "gap <b>not trained on</b>",
        "<mfrac>",
    ):
        assert said in page, said
    assert ask(site, "/group/2/0?first=32")[1].decode().count('class="card"') == 8
    whole = ask(site, "/response/1/7/0?from=960000")[1].decode()
    assert whole.count("y" * 1000) == 40 and "from=60000" in whole


def test_numbers_outside_their_healthy_range_say_what_is_wrong(site):
    page = ask(site, "/")[1].decode()
    assert "healthy: 10 to 90 %; most groups are all wrong or all correct" in page
    assert "a spike compared with the median of recent steps" in page and "healthy: up to 10" in page


def test_a_number_shows_its_course_and_rounding_errors_are_none():
    number = Metric("x", "", "")
    spans = pages.spans(600)
    assert len(spans) == 60 and [*range(600)] == [i for s in spans for i in range(600)[s]]
    out = pages.trend([{"x": float(i)} for i in range(600)], spans, number)
    assert 'points="0.0,18.0 ' in out and '100.0,2.0"' in out
    assert "100.0,10.0" in pages.trend([{"x": 1 + 1e-7 * i} for i in range(3)], pages.spans(3), number)
    assert pages.trend([{"x": None}, {"x": math.nan}, {"x": 2}], pages.spans(3), number) == "<span></span>"
    shown = [pages._short(x) for x in (0, 1.4e-7, -0.125, 12345.0, 0.0321)]
    assert shown == ["0", "0.0000", "−0.125", "12,345", "0.0321"]


def test_time_left_and_silence_are_told(tmp_path):
    (tmp_path / "config.toml").write_text("steps = 10\n")
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"kind": "train", "step": {i}, "elapsed_s": {300 * i}}}\n' for i in (1, 2, 3)))
    state = Watched(tmp_path).state()
    assert (state["left_s"], state["usual_s"]) == (2100, 1500) and "about 35 min left" in pages.state_text(state)
    assert state | {"silent_s": 0} == state | {"silent_s": 0, "ended": False}
    assert "no record for 33 min: has the run stopped?" in pages.state_text(state | {"silent_s": 2000.0})
    path.write_text('{"kind": "train", "step": 1}\n')
    state = Watched(tmp_path).state()
    assert (state["left_s"], state["usual_s"]) == (None, QUIET_S) and "left" not in pages.state_text(state)


def test_pictures_leave_the_processor_to_the_run(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("")
    drawn, now = [], [0.0]
    monkeypatch.setattr("lead_fast.view.server.time.monotonic", lambda: now[0])

    def draw():
        drawn.append(now[0])
        now[0] += 2.0
        return {}

    site = Site(tmp_path, draw)
    for step in range(12):  # a record per second, and a page request after each
        with (tmp_path / "metrics.jsonl").open("a") as f:
            f.write(f'{{"kind": "train", "step": {step + 1}}}\n')
        site.answer("/state")
        while site._drawing is not None:
            time.sleep(0.001)
        now[0] += 1.0
    assert drawn == [0.0, 10.0]  # two seconds of drawing, then eight of rest


@pytest.mark.parametrize(
    "path",
    ["/../secret.txt", "/secret.txt", "/picture/../secret.txt", "/picture/%2e%2e/secret.txt", "/picture/nothing.png",
     "/group/1/99", "/group/9/0", "/response/1/0/9", "/group/1", "/response/1/0", "/group/1/0/0", "/rollouts/",
     "//etc/passwd", "/group/-1/0", "/picture/..%2f..%2fsecret.png", "/group/%D9%A3/0"],
)  # fmt: skip
def test_nothing_else_is_there(site, path):
    reply, data = ask(site, path)
    assert reply.status == 404 and b"secret" not in data


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"])
def test_only_get_is_answered(site, method):
    reply, _ = ask(site, "/", method, body=b"x=1" if method in ("POST", "PUT") else None)
    assert reply.status == 405 and reply.getheader("Allow") == "GET"


@pytest.mark.parametrize(
    "host, here, remote",
    [("127.0.0.1:8421", True, True), ("localhost", True, True), ("[::1]:80", True, True), ("127.8.8.8", True, True),
     ("evil.example", False, False), ("localhost.evil.example", False, False), ("127.0.0.1.evil.example", False, False),
     ("192.168.1.2:8421", False, True), ("", False, False), ("[", False, False), ("a" * 300, False, False)],
)  # fmt: skip
def test_a_host_that_can_be_renamed_is_refused(site, host, here, remote):
    assert allowed_host(host, remote=False) is here and allowed_host(host, remote=True) is remote
    if host and host != "[::1]:80":
        assert ask(site, "/state", host=host)[0].status == (200 if here else 421)


def test_other_machines_are_not_served_unless_that_is_asked_for(tmp_path):
    for host in ("0.0.0.0", "::", "192.168.0.7"):
        with pytest.raises(ValueError, match=rf"--host is {host}, where other machines .* add --remote"):
            check_address(host, remote=False)
        check_address(host, remote=True)
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host, remote=False)
    with pytest.raises(ValueError, match="--host is 'example.com': give an IP address"):
        check_address("example.com", remote=True)
    with pytest.raises(ValueError, match="--host is 0.0.0.0"):
        main([str(tmp_path), "--serve", "--host", "0.0.0.0"])
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        main([str(tmp_path / "nowhere"), "--serve"])
    with pytest.raises(ValueError, match="--port is 70000"):
        make_server(tmp_path, dict, port=70000)


def test_a_port_that_is_taken_is_named(site, tmp_path):
    with pytest.raises(ValueError, match=r"--port \d+ cannot be served .*: give another --port"):
        make_server(tmp_path, dict, port=site.server_address[1])


def test_a_run_that_has_only_begun_is_followed(tmp_path):
    server = make_server(tmp_path, lambda: pictures(tmp_path), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert (
            "No record yet" in ask(server, "/")[1].decode()
            and "No rollouts are kept" in ask(server, "/rollouts")[1].decode()
        )
        before = json.loads(ask(server, "/state")[1])
        m = Metrics(tmp_path, total_steps=2, tensorboard=False)
        m.train(1, {"accuracy": 0.5, "seconds": {"rollout": 1.0}})
        m.close()
        after = json.loads(ask(server, "/state")[1])
        assert before["mark"] != after["mark"] and after["text"].startswith("step 1 · last record 0 s ago")
        assert "<h1>Step 1</h1>" in ask(server, "/")[1].decode()
        (tmp_path / "metrics.jsonl").write_text('{"kind": "sft", "step": 1, "loss": 1.0}\n')
        assert "A run of lead_fast.sft" in ask(server, "/")[1].decode()
    finally:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------------------------------ browser


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on this machine (Debian: apt-get install chromium), so no browser has looked at the page")


def browse(chromium: str, folder: Path, url: str, *more: str) -> str:
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *more]
    command += [f"--user-data-dir={folder}", "--virtual-time-budget=2000", "--enable-logging=stderr", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Content Security Policy" not in done.stderr and "Uncaught" not in done.stderr, done.stderr[-2000:]
    return done.stdout


def test_a_browser_renders_mathematics_and_runs_nothing_that_a_model_wrote(chromium, site, tmp_path):
    from matplotlib.image import imread

    base = f"http://127.0.0.1:{site.server_address[1]}"
    for path in ("/group/1/0", "/group/1/5"):  # a script tag, and text that would close the page's own elements
        page = browse(chromium, tmp_path / "profile", base + path, "--dump-dom")
        assert "<title>&lt;script&gt;a'b</title>" in page and page.count("<script>") == 1
    shot = tmp_path / "page.png"
    browse(chromium, tmp_path / "profile", f"{base}/group/2/0", f"--screenshot={shot}", "--window-size=600,900")
    pixels = imread(shot)[..., :3]
    assert pixels.shape == (900, 600, 3) and 0.005 < (pixels < 0.6).any(-1).mean() < 0.5


class Browser:
    """A page in headless Chromium, controlled over its debugging pipe with JSON messages that end in a zero byte."""

    def __init__(self, chromium: str, profile: Path):
        (its_in, to), (back, its_out) = os.pipe(), os.pipe()
        its_in, its_out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (its_in, its_out))  # must not be 3 or 4
        start = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4)"
        start += "; os.execv(sys.argv[3], sys.argv[3:])"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        command = [chromium, *flags, "--window-size=900,700", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen([sys.executable, "-c", start, str(its_in), str(its_out), *command],
                                        pass_fds=(its_in, its_out), stderr=subprocess.DEVNULL)  # fmt: skip
        for fd in (its_in, its_out):
            os.close(fd)
        self.to, self.back = os.fdopen(to, "wb"), os.fdopen(back, "rb")
        self.count, self.session = 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def call(self, method: str, **params: object) -> dict:
        self.count += 1
        self.to.write(json.dumps({"id": self.count, "method": method, "params": params, **self.session}).encode())
        self.to.write(b"\0")
        self.to.flush()
        while True:
            message = bytearray()
            while (byte := self.back.read(1)) not in (b"\0", b""):
                message += byte
            assert message, "Chromium has ended"
            reply = json.loads(message)
            if reply.get("id") == self.count:
                assert "error" not in reply, reply
                return reply["result"]

    def run(self, expression: str):
        """Evaluate an expression in the page, await it, and return the value."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, expression: str) -> None:
        for _ in range(300):
            if self.run(expression):
                return
            time.sleep(0.1)
        raise AssertionError(f"{expression} did not come true: {self.run('document.body.innerText')[:500]}")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && typeof look === 'function'")

    def close(self) -> None:
        self.to.close()
        self.process.wait(timeout=30)
        self.back.close()


def test_a_browser_follows_a_run_and_keeps_the_readers_place(chromium, tmp_path):
    run = tmp_path / "run"
    m, store = Metrics(run, total_steps=40, tensorboard=False), Rollouts(run, 10**8)

    def step(n: int) -> None:
        add(store, n, [plain_group(n, i, i % 5) for i in range(20)])
        m.train(n, {"accuracy": n / 40, "seconds": {"rollout": 1.0}, "solve_rate_histogram": [1, 2, 1]})

    for n in range(1, 7):
        step(n)
    server = make_server(run, lambda: pictures(run), port=0)
    server.site._draw("before")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}"
    browser = Browser(chromium, tmp_path / "profile")
    try:
        browser.open(base + "/")
        browser.wait("document.images.length > 2 && [...document.images].every(i => i.naturalWidth > 0)")
        browser.run("window.scrollTo(0, 700)")
        before = browser.run("scrollY")
        step(7)
        browser.run("look()")
        assert before > 500 and browser.run("[document.querySelector('h1').textContent, scrollY]") == ["Step 7", before]
        assert browser.run("document.querySelectorAll('svg polyline').length") >= 1

        browser.open(base + "/rollouts?solve=1-99&correct=yes")
        browser.run("document.querySelector('[name=step]').value = '3-'; window.scrollTo(0, 300)")
        step(8)
        browser.run("look()")
        state = "[scrollY, document.querySelector('[name=step]').value, news.hidden]"
        assert browser.run(state) == [300, "3-", False]  # a list does not change until asked
        assert browser.run("document.querySelector('td').textContent") == "7"
        browser.run("news.click()")
        browser.wait("news.hidden")
        assert browser.run("[document.querySelector('td').textContent, scrollY, news.hidden]") == ["8", 300, True]
        filters = "['solve', 'correct'].map(name => document.querySelector(`[name=${name}]`).value)"
        assert browser.run(filters) == ["1-99", "yes"]

        browser.run("document.querySelector('td a').click()")
        browser.wait("location.pathname.startsWith('/group/8/') && document.readyState === 'complete'")
        browser.run("document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))")
        browser.wait("location.pathname === '/group/8/2' && document.readyState === 'complete'")
        assert browser.run("location.search") == "?solve=1-99&correct=yes"
    finally:
        browser.close()
        server.shutdown()
        server.server_close()
        m.close()
