"""Test programs under guard: hostile ones harm nothing outside and end in time; grading of LiveCodeBench."""

import base64
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import made_programs
import pytest
from jobs import ROOT, environment
from made_programs import MADE, WRONG

from lead_fast.config import RewardConfig
from lead_fast.data import livecodebench
from lead_fast.data.livecodebench import load_programs, parse_source, prompt, read_tests, unpickle_data
from lead_fast.records import Response
from lead_fast.reward import cell
from lead_fast.reward.programs import (
    FIRST_UID,
    GuardFailure,
    Limits,
    Programs,
    Verdict,
    extract_program,
    protection,
    run,
    same_output,
    same_value,
)

SET = made_programs.DATA / "livecodebench.jsonl"
SHORT = Limits(cpu_s=1, wall_s=2.0, memory_bytes=256 << 20, box_bytes=16 << 20, output_bytes=1 << 20)
BROKEN = replace(SHORT, wall_s=10.0, memory_bytes=512 << 20)


@pytest.fixture(scope="module")
def guard() -> str:
    """The guard in force. Without one, tests that run programs are skipped; with CI set they fail."""
    try:
        return protection()
    except GuardFailure as e:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(e))


# ------------------------------------------------------------------------------------------------------------- hostile

# Programs of data/hostile_programs.txt: `=== NAME: how it may end`, then the program, which is run after PRELUDE. Each
# prints ESCAPED if it succeeds, and its test expects that output, so a program that passes has broken out. The fixture
# `outside` says what each `{...}` stands for.
PRELUDE = """import ctypes, gc, glob, mmap, os, re, resource, shutil, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def tried(f, *a):
    try:
        return f(*a)
    except Exception as e:
        return None
"""


def read_hostile() -> dict[str, tuple[str, set[str]]]:
    text = (made_programs.DATA / "hostile_programs.txt").read_text()
    blocks = re.findall(r"^=== (.*): (.*)\n((?:(?!=== ).*\n)*)", text, re.M)
    return {name: (PRELUDE + program, set(reasons.split(", "))) for name, reasons, program in blocks}


HOSTILE = read_hostile()
FORGED = "class Solution:\n    def f(self, x):\n        import os\n        os.write({fd}, b'\"ESCAPED\"')\n"


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Targets of hostile programs, and whether a program reached them."""
    folder = tmp_path_factory.mktemp("outside")
    os.chmod(folder, 0o777)
    (folder / "expected.txt").write_text("ESCAPED")
    os.chmod(folder / "expected.txt", 0o666)
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(f"\0lead-fast-{os.getpid()}")
    unix.listen()
    for s in (tcp, unix):
        s.setblocking(False)
    secret = hashlib.sha256(os.urandom(8)).hexdigest()
    os.environ["LEAD_FAST_TEST_TOKEN"] = secret
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    x86 = os.uname().machine == "x86_64"
    words = {"folder": folder, "name": "expected.txt", "pid": os.getpid(), "port": tcp.getsockname()[1],
             "secret": secret,
             "abstract": f"lead-fast-{os.getpid()}", "prefix": os.path.realpath(sys.base_prefix),
             "clone": 56 if x86 else 220, "keyctl": 250 if x86 else 219}  # fmt: skip
    yield SimpleNamespace(folder=folder, victim=victim, sockets=(tcp, unix), words=words, caught=caught)
    signal.signal(signal.SIGTERM, before)
    del os.environ["LEAD_FAST_TEST_TOKEN"]
    victim.kill()
    victim.wait()
    for s in (tcp, unix):
        s.close()


def filled(text: str, words: dict) -> str:
    return re.sub(r"\{\{(\w+)\}\}|\{(\w+)\}", lambda m: f"{{{m[1]}}}" if m[1] else str(words.get(m[2], m[0])), text)


def ancestors(pid: int) -> list[int]:
    """Ancestors of a process, the nearest first."""
    out = []
    while pid > 1:
        pid = int(re.findall(r"^PPid:\t(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[0])
        out.append(pid)
    return out


def guarded() -> list[int]:
    """Processes of guards as seen from outside, found by a user that only guards have or by the cell's source text.

    Processes of other workers of this test run are left out; orphans count.
    """
    out = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            user = int(re.findall(r"^Uid:\t(\d+)", (p / "status").read_text(), re.M)[0])
            above = ancestors(int(p.name))
            if os.getppid() in above and os.getpid() not in above:
                continue
            if user >= FIRST_UID or b"def drop_privileges" in (p / "cmdline").read_bytes():
                out.append(int(p.name))
        except OSError:  # the process has ended
            continue
    return out


def test_hostile_programs_harm_nothing_and_their_neighbours_are_graded_right(guard, outside):
    assert len(HOSTILE) >= 40
    neighbour = ("import time\ntime.sleep(0.1)\nprint(int(input()) ** 2)", [("7", "49"), ("-3", "9")])
    files = {p: p.read_bytes() for p in outside.folder.iterdir()}
    shm, host, mounts = set(os.listdir("/dev/shm")), os.uname().nodename, Path("/proc/self/mounts").read_text()

    def timed(job: tuple[str, str, tuple]) -> tuple[Verdict, float]:
        began = time.monotonic()
        verdict = run(job[1], job[2], SHORT)
        return verdict, time.monotonic() - began

    jobs = []
    for name, (text, _) in HOSTILE.items():
        jobs.append((name, filled(text, outside.words), (None, [("", "ESCAPED")])))
        jobs.append(("", neighbour[0], (None, neighbour[1])))
    with ThreadPoolExecutor(6) as pool:
        done = list(zip(jobs, pool.map(timed, jobs), strict=True))
    for (name, _, _), (verdict, seconds) in done:
        if not name:
            assert verdict == Verdict(True, "passed")
            continue
        assert not verdict.passed, f"{name} broke out"
        assert verdict.reason in HOSTILE[name][1], f"{name}: {verdict}"
        assert seconds < 20, f"{name} took {seconds:.1f} s"
    assert {p: p.read_bytes() for p in outside.folder.iterdir()} == files
    assert outside.victim.poll() is None and not outside.caught
    for s in outside.sockets:
        with pytest.raises(BlockingIOError):
            s.accept()
    assert set(os.listdir("/dev/shm")) - shm == set() and os.uname().nodename == host
    assert Path("/proc/self/mounts").read_text() == mounts
    until = time.monotonic() + 10
    while guarded() and time.monotonic() < until:
        time.sleep(0.05)
    assert not guarded()
    if Path("/sys/fs/cgroup/pids").is_dir():
        assert not list(Path("/sys/fs/cgroup/pids").glob(f"lead-fast-{os.getpid()}-*"))


def test_a_function_that_writes_its_own_verdict_is_wrong(guard):
    for fd in range(3, 9):
        forged = FORGED.replace("{fd}", str(fd))
        verdict = run(forged, ("f", [("1", '"right"')]), SHORT)
        assert not verdict.passed
    sly = "class Right:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Right()"
    assert run(sly, ("f", [("1", "1")]), SHORT).reason == WRONG
    assert run("def f(x):\n    return x", ("f", [("1", "1")]), SHORT).passed


def test_nothing_is_left_when_the_process_that_grades_is_killed(guard, tmp_path):
    text = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
from lead_fast.reward.programs import run
print("ready", flush=True)
run("import os, time\\nos.fork() or os.setsid()\\ntime.sleep(600)", (None, [("", "")]))
"""
    grader = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, env=environment())
    assert grader.stdout and grader.stdout.readline() == b"ready\n"
    until = time.monotonic() + 20
    while len(guarded()) != 4 and time.monotonic() < until:  # the outer process, process 1, the program and its child
        time.sleep(0.02)
    assert time.monotonic() < until
    grader.kill()
    grader.wait()
    while guarded() and time.monotonic() < until:
        time.sleep(0.02)
    assert not guarded()


def test_an_ordinary_user_has_a_guard_too(guard):
    """Here the guard starts with a user namespace. Such a user must be able to start the interpreter."""
    if os.geteuid() != 0:
        pytest.skip("this test run is an ordinary user's, so every other test shows it")
    python = next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if os.access(p, os.X_OK)), None)
    if python is None:
        pytest.skip("no Python outside of root's own folders")
    text = f"""
import sys, types
for name in ("lead_fast", "lead_fast.reward", "lead_fast.config", "lead_fast.records"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["lead_fast"].__path__, sys.modules["lead_fast.reward"].__path__ = [], [{str(ROOT / "lead_fast/reward")!r}]
sys.modules["lead_fast.config"].RewardConfig = object
for name in ("Problem", "Response", "Sample", "Score"):
    setattr(sys.modules["lead_fast.records"], name, object)
from lead_fast.reward.programs import Limits, protection, run
print(protection())
short = Limits(cpu_s=1, wall_s=2.0, memory_bytes=256 << 20)
for program in sys.argv[1:]:
    print(run(program, (None, [("", "ESCAPED")]), short).reason)
"""
    names = [
        "fork bomb that goes on",
        "write to the system",
        "memory of children",
        "become root",
        "new namespaces",
        "sleep",
    ]
    words = {"prefix": "/usr", "clone": 56, "folder": "/", "pid": 1}
    given = [filled(HOSTILE[n][0], words) for n in names]

    def lower() -> None:
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)

    done = subprocess.run([python, "-I", "-c", text, *given], preexec_fn=lower, capture_output=True, text=True, cwd="/")
    if "Permission denied" in done.stderr:
        pytest.skip("the working tree is not readable by an ordinary user")
    assert done.returncode == 0, done.stderr
    said, *reasons = done.stdout.splitlines()
    assert "as user 54321 without capabilities" in said
    for name, reason in zip(names, reasons, strict=True):
        assert reason in HOSTILE[name][1], name


def test_what_is_in_force_is_said_and_insisted_on(guard, monkeypatch, tmp_path):
    assert all(kind in guard for kind in cell.NAMESPACES) and re.search(r"as user \d+ without capabilities", guard)
    here = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in cell.NAMESPACES}
    source = Path(cell.__file__).read_text()
    changes = [
        ("    drop_privileges(machine, architecture)\n", "    pass\n"),  # keeps capabilities, sets no filter
        ('call("unshare", others)', f'call("unshare", {cell.NEW_NS | cell.NEW_PID})'),  # the network is shared
        ("enter(settings)", "pass"),  # no guard at all
        ("enter(settings)", 'raise OSError("not permitted")'),
    ]
    for old, new in changes:
        if os.geteuid() != 0 and "others" in old:
            continue
        assert source.count(old) >= 1
        (tmp_path / "cell.py").write_text(source.replace(old, new))
        monkeypatch.setattr(cell, "__file__", str(tmp_path / "cell.py"))
        with pytest.raises(GuardFailure, match="incomplete here|can be built here") as e:
            protection()
        assert "\n" not in str(e.value)
    assert here["pid"] == os.readlink("/proc/self/ns/pid")


def test_a_test_leaves_nothing_for_the_next_and_the_folder_is_the_programs_own(guard):
    stays = ("import os, time\nn = int(input())\nif n == 1:\n    if os.fork() == 0:\n        time.sleep(99)\nelse:\n"
             "    n = len([p for p in os.listdir('/proc') if p.isdigit()])\nprint(n)")  # fmt: skip
    assert run(stays, (None, [("1", "1"), ("2", "2")]), SHORT).passed
    lent = {p.split("/")[2] for p in (sys.prefix, sys.base_prefix, str(ROOT)) if p.startswith("/tmp/")}  # read-only
    writes = ("open('x', 'w').write('5')\nimport os\n"
              f"print(open('/tmp/x').read(), os.getcwd(), sorted({{*os.listdir('.')}} - {lent or '{0}'}))")  # fmt: skip
    assert run(writes, (None, [("", "5 /tmp ['x']")]), SHORT).passed
    state = "class Solution:\n    def __init__(self):\n        self.n = 0\n    def f(self):\n        return 1"
    assert run(state.replace("f(self)", "f(self, x)"), ("f", [("1", "1")]), SHORT).passed


# ---------------------------------------------------------------------------------------------------------- comparison


@pytest.mark.quick
@pytest.mark.parametrize(
    "output, expected, same",
    [
        ("1 2\n3\n", "1 2\n3", True),
        (" 1 2 \n3\n\n", "1 2\n3", True),
        ("1  2", "1 2", True),  # decimals are compared word by word
        ("a  b", "a b", False),  # other text is not
        ("0.50", "0.5", True),
        ("1e3", "1000", True),
        ("0.3333333", "0.3333334", False),  # no tolerance
        ("50000000000000000", "50000000000000001", False),
        ("1\n2", "1 2", False),
        ("YES", "Yes", False),
        ("", "", True),
        ("1\n\n2", "1\n2", False),
        ("nan", "nan", True),
        ("nan 1", "NaN 1", False),
        ("sNaN 1", "1 1", False),
    ],
)
def test_outputs_are_compared_as_the_benchmark_does(output, expected, same):
    assert same_output(output, expected) is same


@pytest.mark.quick
@pytest.mark.parametrize(
    "returned, expected, same",
    [
        ([1, 2], "[1, 2]", True),
        ((1, 2), "[1, 2]", True),  # a tuple counts as a list, but only at the top level
        ([(1, 2)], "[[1, 2]]", False),
        (True, "1", True),
        (1.0, "1", True),
        ("1", "1", False),
        ({"a": 1}, '{"a": 1}', True),
        ({1: 2}, '{"1": 2}', False),
        ({1, 2}, "[1, 2]", False),
        (None, "null", True),
        (10**5000, "1" + "0" * 5000, True),
        ({"tuple": [1]}, '{"tuple": [1]}', True),  # is not mistaken for the cell's encoding of a tuple
    ],
    ids=lambda v: type(v).__name__,
)
def test_values_are_compared_as_python_does(returned, expected, same):
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(10_000)
    sent = json.dumps(cell.plain(list(returned) if isinstance(returned, tuple) else returned))
    sys.set_int_max_str_digits(4300)
    assert same_value(sent, expected) is same


@pytest.mark.quick
@pytest.mark.parametrize(
    "sent", ["", "{", "[" * 100_000, '{"dict": [[[], 1]]}', '{"dict": [1]}', '{"x": 1}', "nothing"]
)
def test_what_the_cell_does_not_send_is_wrong(sent):
    assert same_value(sent, "1") is False


@pytest.mark.quick
def test_the_program_is_the_last_fenced_block():
    assert extract_program("```python\na\n```\ntext\n```\nb\nc\n```\nbye") == "b\nc"
    assert extract_program("```python\na\n```") == "a"
    assert extract_program("no program") is None and extract_program("```python\nunfinished") is None


# --------------------------------------------------------------------------------------------------------- the made set


def programs_of() -> dict[str, dict]:
    lines = (made_programs.DATA / "livecodebench_programs.jsonl").read_text().splitlines()
    return {row["question_id"]: row for row in map(json.loads, lines)}


def test_the_made_set_is_what_its_maker_makes():
    stored = [json.loads(line) for line in SET.read_text().splitlines()]
    for a, b in zip(stored, made_programs.rows(), strict=True):
        assert read_tests(a.pop("private_test_cases")) == read_tests(b.pop("private_test_cases"))
        assert a == b
    assert {m.difficulty for m in MADE} == {"easy", "medium", "hard"} and len(MADE) == 20
    assert [[m.reference, *m.extra] for m in MADE] == [row["right"] for row in programs_of().values()]


def test_reference_programs_pass_and_broken_ones_fail_for_their_reason(guard):
    problems, tests = load_programs(str(SET))
    stored = programs_of()
    jobs = [(p, program, "passed") for p in problems for program in stored[p.id]["right"]]
    jobs += [(p, program, reason) for p in problems for program, reason in stored[p.id]["broken"].items()]
    with ThreadPoolExecutor(4) as pool:
        for (p, program, reason), verdict in zip(
            jobs, pool.map(lambda job: run(job[1], tests(job[0]), BROKEN), jobs), strict=True
        ):
            assert verdict.reason == reason, f"{p.id}: {verdict} instead of {reason}:\n{program}"


def test_the_prompt_is_the_authors():
    problems, _ = load_programs(str(SET))
    first, last = problems[0], problems[-1]
    assert first.problem.startswith("You will be given a question (problem specification) and will generate a correct")
    assert f"Question: {MADE[0].statement}\n\nRead the inputs from stdin" in first.problem
    assert first.problem.endswith("writes output to STDOUT.\n```python\n# YOUR CODE HERE\n```\n\n")
    assert last.problem.endswith(f"within delimiters.\n```python\n{MADE[-1].starter}\n```\n\n")
    assert prompt("q", "") != prompt("q", "x")


def test_names_versions_and_dates(tmp_path, monkeypatch):
    assert (
        parse_source("arithmetic:test")
        is parse_source("AIME24")
        is parse_source("tests/data/answer_pairs.jsonl")
        is None
    )
    assert [len(livecodebench.VERSIONS[v]) for v in ("v1", "v5", "v6")] == [1, 5, 6]
    source = parse_source("livecodebench:release_v6?from=2024-08-01")
    assert source and source.version == "v6" and source.path is None and source.first.year == 2024
    for text, says in (("LiveCodeBench:v9", "give one of v1"), ("LiveCodeBench?from=May", "has an invalid date"),
                       ("LiveCodeBench?since=2024-01-01", "cannot be parsed"),
                       ("LiveCodeBench?x", "has an invalid date")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            parse_source(text)
    late, _ = load_programs(f"{SET}?from=2025-01-01&to=2025-01-31")
    assert [p.id for p in late] == ["turn-a-matrix", "median"]
    with pytest.raises(ValueError, match="no problem left"):
        load_programs(f"{SET}?from=2030-01-01")
    shutil.copy(SET, tmp_path / "set.json")
    with pytest.raises(ValueError, match="save it as .jsonl"):
        parse_source(str(tmp_path / "set.json"))


def test_by_name_from_the_hubs_cache(tmp_path):
    """Uses the hub's own client, offline, on a cache with its layout."""
    commit = "a" * 40
    repository = tmp_path / "hub" / "datasets--livecodebench--code_generation_lite"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    lines = SET.read_text().splitlines(keepends=True)
    for i in range(5):
        (repository / "snapshots" / commit / f"test{i + 1 if i else ''}.jsonl").write_text(
            "".join(lines[4 * i : 4 * i + 4])
        )
    text = """
from lead_fast.data.livecodebench import load_programs
problems, tests = load_programs("LiveCodeBench")
print(len(problems), [len(tests(p)[1]) for p in problems], problems[7].id)
print(len(load_programs("LiveCodeBench:v2")[0]))
try:
    load_programs("LiveCodeBench:v6")
except ValueError as e:
    print(e)
"""
    env = environment(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub"), HF_HOME=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == f"20 {[len(m.inputs) for m in MADE]} {MADE[7].name}" and second == "8"
    assert "test6.jsonl could not be fetched from the hub" in third


class Evil:
    def __reduce__(self):
        return os.system, ("echo ESCAPED",)


@pytest.mark.quick
def test_a_pickle_of_anything_but_data_is_not_read(tmp_path):
    held = {"a": [1, -2.5, "é", None, True, 10**30], "b": {"c": []}}
    for protocol in range(6):
        assert unpickle_data(pickle.dumps(held, protocol)) == held
    marker = tmp_path / "ran"
    by_name = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    for data in (pickle.dumps(Evil()), by_name, pickle.dumps({1, 2}), pickle.dumps((1, 2)), pickle.dumps(b"x"),
                 pickle.dumps(len), pickle.dumps(Path("x")), b"", b"\x80\x04.", b"\x80\x04K", b"(((", b"h\x05.",
                 b"\x82\x01.", b"P1\n.", b"]]b."):  # fmt: skip
        with pytest.raises(ValueError):
            unpickle_data(data)
    assert not marker.exists()
    with pytest.raises(ValueError, match="GLOBAL"):
        unpickle_data(pickle.dumps(Evil(), 4))


@pytest.mark.parametrize(
    "column, value, says",
    [
        ("private_test_cases", "no base64", "neither JSON nor base64"),
        ("private_test_cases", base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode(), "strings, numbers"),
        ("private_test_cases", base64.b64encode(zlib.compress(pickle.dumps("[]"))[:-3]).decode(), "cut short"),
        ("private_test_cases", base64.b64encode(zlib.compress(pickle.dumps("["))).decode(), "not valid JSON"),
        ("public_test_cases", '[{"input": 5}]', "strings input and output"),
        ("difficulty", "odd", "difficulty is 'odd'"),
        ("question_content", " ", "question_content is empty"),
        ("metadata", "{}", "metadata has no func_name"),
        ("contest_date", "soon", "Invalid isoformat"),
        ("question_id", MADE[0].name, "appears twice"),
        ("platform", ..., "it has no platform"),
    ],
)
def test_a_damaged_row_is_named(column, value, says, tmp_path):
    rows = made_programs.rows()[:13]  # the last one calls a function
    rows[-1][column] = value
    if value is ...:
        del rows[-1][column]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(ValueError, match=f"set.jsonl, row 13: .*{says}") as e:
        load_programs(str(tmp_path / "set.jsonl"))
    assert "\n" not in str(e.value)


def test_responses_are_graded_by_their_programs(guard):
    problems, tests = load_programs(str(SET), limit=2)
    right = programs_of()[problems[0].id]["right"][0]
    texts = [f"Thought.</think>\n```python\n{right}\n```", f"```python\n{right}\n```</think> none", "</think>none",
             f"```python\n{right}\n```", "</think>```\nprint(1)\n```"]  # fmt: skip
    texts[4] = "</think>\n```\nprint(1)\n```"
    responses = {0: [Response([1], [0.0], "stop", t, 0) for t in texts]}
    grader = Programs(tests, SHORT, workers=2)
    samples = grader.grade(problems, responses, RewardConfig(grade="after_think"))[0]
    assert [s.score.correct for s in samples] == [True, False, False, False, False]
    assert [s.score.extracted for s in samples] == [right, None, None, None, "print(1)"]
    assert [s.score.truncated for s in samples] == [False, False, False, True, False]
    assert grader.reasons == {"passed": 1, "no program": 3, "wrong answer": 1}


def test_an_interrupted_grading_waits_for_no_program(guard):
    problems, tests = load_programs(str(SET), limit=2)

    def interrupted(problem):
        if problem is problems[0]:
            time.sleep(1)
            raise KeyboardInterrupt
        return tests(problem)

    sleeps = [Response([1], [0.0], "stop", f"```\nimport time\ntime.sleep({60 + i})\n```", 0) for i in range(3)]
    grader = Programs(interrupted, replace(SHORT, wall_s=60.0), workers=2)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        grader.grade(problems, {0: sleeps[:1], 1: sleeps}, RewardConfig())
    assert time.monotonic() - began < 15 and not grader.running


ANSWERING = """
import json, sys
from lead_fast import evaluate
from lead_fast.data.livecodebench import load_code_test
from lead_fast.records import Response

STORED = {r["question_id"]: r for r in map(json.loads, open(sys.argv[1]))}


class Answering:  # gives a right program and a broken one to each prompt
    def __init__(self, c, tokenizer):
        problems, prompts, _ = load_code_test(c, tokenizer)
        self.ids = {tuple(p): problem.id for problem, p in zip(problems, prompts)}

    def generate(self, work, sampling, progress=None):
        out = {}
        while taken := work.take(4):
            for i in taken:
                stored = STORED[self.ids[tuple(work.prompts[i])]]
                broken = next((p for p, why in stored["broken"].items() if why != "time limit"), "print('none')")
                texts = [f"So:\\n```python\\n{p}\\n```" for p in (stored["right"][-1], broken)]
                out[i] = [Response([7] * len(t), [0.0] * len(t), "stop", t, 0) for t in texts]
        return out


evaluate.make_engine = lambda c, tokenizer, ranks: Answering(c, tokenizer)
try:
    evaluate.main([a for a in sys.argv[2:] if a != "--allow_code"])
except ValueError as e:
    print(f"error: {e}")
evaluate.stop()
evaluate.main(sys.argv[2:])
"""


def test_the_made_set_through_the_whole_evaluation(guard, tmp_path):
    """Everything except the engine is real: command line, prompts, guard, grading, samples.jsonl, tables."""
    from lead_fast import tables

    args = [f"--data.test={SET}", "--allow_code", "--evaluate.samples=2", f"--output={tmp_path}",
            "--data.max_prompt_tokens=4096", "--data.instruction=Box it."]  # fmt: skip
    stored = made_programs.DATA / "livecodebench_programs.jsonl"
    done = subprocess.run([sys.executable, "-c", ANSWERING, str(stored), *args], capture_output=True, text=True,
                          env=environment(), timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^error: .* is graded by running programs .*: allow it with --allow_code\.$", done.stdout, re.M)
    assert "Programs run under guard" in done.stdout and "data.instruction is left out" in done.stdout
    assert "Programs: 20 passed, " in done.stdout and "wrong answer" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()][1:]
    assert len(rows) == 20 and all(r["correct"] == [True, False] for r in rows)
    assert rows[0]["extracted"][0] == MADE[0].extra[-1] and all(r["votes"] is None for r in rows)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["pass_at_1"] == 0.5 and record["pass_at_2"] == 1.0 and "cons_at_k" not in record
    made = tables.groups(tables.read_evaluation(tmp_path))
    assert {k: g.problems for k, g in made.items()} == {
        level: sum(m.difficulty == level for m in MADE) for level in ("easy", "medium", "hard")
    }
    assert re.search(r"^\| hard \| \d+ \| - \| 1\.0 ", done.stdout, re.M)


@pytest.mark.quick
def test_training_does_not_take_programs():
    from lead_fast.data.read import load_problems

    with pytest.raises(ValueError, match="only python -m lead_fast.evaluate"):
        load_problems("LiveCodeBench", split="test")
