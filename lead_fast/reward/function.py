"""The user's own reward function, called in a process that may be killed. docs/own-reward.md shows how to write one.

The function is named `path/to/FILE.py:name` or `module:name`. It receives those of the arguments `problem`, `response`,
`reference`, `columns` (the row of the data file, if it was kept) and `correct` (the verifier's verdict) that it names.
What it returns becomes a dict of terms whose entry `reward` is the total:

- a number or a bool becomes `{"reward": value}`;
- a dict of numbers is used as it is; without an entry `reward`, the total is the sum of all.

Responses are sent to the worker in batches and come back one by one, so that the time limit applies to each. A response
whose call raises, takes too long or returns anything else gets the value of reward.function_failed; a worker that
stalls or dies is replaced, and the new one continues after that response.
"""

import contextlib
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from ..records import Problem

if TYPE_CHECKING:  # a worker does not import torch
    from ..config import RewardConfig

LARGEST = 1e6  # largest |reward|; beyond it the sum of squares over a group loses float32's digits
ARGUMENTS = ("problem", "response", "reference", "columns", "correct")
START_S = 300.0  # for the worker's imports and its first call, which may load a model
BATCH = 64  # responses sent to the worker at once


class Call(NamedTuple):
    """What the function is called with for one response; the fields are ARGUMENTS."""

    problem: str
    response: str
    reference: str
    columns: dict[str, Any]
    correct: bool


def call_of(problem: Problem, response: str, correct: bool) -> Call:
    """Make the call for a response to `problem`."""
    return Call(problem.problem, response, problem.reference, getattr(problem, "columns", None) or {}, correct)


class Value(NamedTuple):
    """Terms of one response, with `reward` as the total, and whether they replace those of a call that failed."""

    terms: dict[str, float]
    failed: bool


# -------------------------------------------------------------------------------------------------- inside the worker


class Refused(ValueError):
    """A function, or its name, cannot be used; the sentence says why."""


def split_name(name: str) -> tuple[str, str]:
    """Split into file or module, and the name in it. Raises Refused if it has another form or the file is missing."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise Refused(f"reward.function is {name!r}: write path/to/FILE.py:name or module:name.")
    path = Path(place).expanduser().absolute()
    if place.endswith(".py") and not path.is_file():
        raise Refused(f"reward.function is {name!r} and there is no file {path}.")
    return place, attribute


def load_function(name: str) -> Callable[..., Any]:
    """Load the function that `FILE.py:name` or `module:name` names; it may take only ARGUMENTS.

    Raises:
        Refused: one sentence on what is wrong with the name, the file or the function's signature.
    """
    place, attribute = split_name(name)
    if place.endswith(".py"):
        path = Path(place).expanduser().absolute()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))  # for what the file imports from its own folder
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        try:
            found = importlib.util.find_spec(place)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise Refused(f"reward.function is {name!r} and there is no module {place}: give path/to/FILE.py:name.")
        module = importlib.import_module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise Refused(
            f"reward.function is {name!r} and {place} has no function {attribute}: it has {', '.join(names) or 'none'}."
        )
    for p in inspect.signature(function).parameters.values():
        needed = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if needed and (p.name not in ARGUMENTS or p.kind is p.POSITIONAL_ONLY):
            raise Refused(f"reward.function {name} takes {p.name}: it may take {', '.join(ARGUMENTS)}, by name.")
    return function


def arguments_of(function: Callable[..., Any]) -> list[str]:
    """The arguments among ARGUMENTS that a function takes."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return [k for k in ARGUMENTS if takes_all or k in parameters]


def terms_of(returned: Any) -> dict[str, float]:
    """Convert what a function returned to named terms with a total.

    Raises:
        TypeError: it is neither a number, a bool nor a dict of them by name.
        ValueError: a number is not finite, or is beyond LARGEST.
    """
    if not isinstance(returned, dict):
        return {"reward": number_of(returned, "the value")}
    if not returned or not all(isinstance(k, str) for k in returned):
        raise TypeError(f"returned {returned!r:.100}: give a number, or a dict of numbers by name")
    terms = {k: number_of(v, f"term {k}") for k, v in returned.items()}
    return {"reward": number_of(math.fsum(terms.values()), "the sum")} | terms  # the total first, given or not


def number_of(x: Any, what: str) -> float:
    x = x.item() if hasattr(x, "item") else x  # of numpy or torch
    if not isinstance(x, numbers.Real):
        raise TypeError(f"returned {x!r:.100}: {what} is a {type(x).__name__}, not a number")
    if not abs(float(x)) <= LARGEST:
        raise ValueError(f"returned {float(x)}: {what} must be from {-LARGEST:.0f} to {LARGEST:.0f}")
    return float(x)


def answer(function: Callable[..., Any], wanted: Sequence[str], call: Call) -> dict[str, Any]:
    """Return the function's terms for one call, or why there are none."""
    try:
        returned = function(**{k: getattr(call, k) for k in wanted})
    except Exception as e:  # anything that the user's code raises costs only this response
        own = [f for f in traceback.extract_tb(e.__traceback__) if f.filename != __file__]
        text = "".join(["Traceback:\n", *traceback.format_list(own), *traceback.format_exception_only(e)])
        return {"failed": f"raised {type(e).__name__}: {e}", "traceback": text}
    try:
        return {"terms": terms_of(returned)}
    except (TypeError, ValueError) as e:
        return {"failed": str(e)}


def worker() -> None:
    """Serve calls: read pickled batches from stdin, write one line of JSON per call to stdout."""
    import ctypes

    if sys.platform == "linux":  # no worker outlives the trainer, however that ends
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    calls, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # keep the function's own input and output out of the protocol
    os.dup2(2, 1)

    def tell(x: dict[str, Any]) -> None:
        results.write(json.dumps(x) + "\n")
        results.flush()

    name, sample = pickle.load(calls)
    try:
        function = load_function(name)
    except Refused as e:
        return tell({"refused": str(e)})
    except (Exception, SystemExit) as e:  # anything that the user's file raises on import
        return tell({"refused": f"reward.function {name} cannot be imported: {type(e).__name__}: {e}.",
                     "traceback": traceback.format_exc()})  # fmt: skip
    wanted = arguments_of(function)
    tell(answer(function, wanted, sample))
    while True:
        try:
            batch = pickle.load(calls)
        except EOFError:
            return
        for call in batch:
            tell(answer(function, wanted, call))


# ------------------------------------------------------------------------------------------------- inside the trainer


class RewardFunction:
    """Call the user's function; a context manager, so that no process is left behind.

    Args:
        c: uses function, function_timeout_s and function_failed.
        sample: a problem of the data, with which the function is called before anything else.
        say: prints what failed the first time.
    Raises:
        ValueError: one sentence: the function cannot be found or imported, takes other arguments, or fails on a correct
            response to the sample.
    """

    def __init__(self, c: "RewardConfig", sample: Problem, say: Callable[[str], object] = print):
        self.c, self.say = c, say
        self.sample = call_of(sample, f"\\boxed{{{sample.reference}}}", True)
        self.process: subprocess.Popen | None = None
        self.failed, self._buffer = 0, b""
        self._start()

    def __enter__(self) -> "RewardFunction":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self.close()

    def __call__(self, calls: Sequence[Call]) -> list[Value]:
        """The terms of every response, in order."""
        values: list[Value] = []
        for first in range(0, len(calls), BATCH):
            batch, at = calls[first : first + BATCH], len(values)
            while (done := len(values) - at) < len(batch):
                if self.process is None or self.process.poll() is not None:  # died while idle: no response failed
                    self.close()
                    self._start()
                values += self._ask(batch[done:])
        return values

    def _ask(self, batch: Sequence[Call]) -> list[Value]:
        """Terms of the batch, or of its part before a response at which the worker stalled or died."""
        limit_s, values = self.c.function_timeout_s, []
        sent = self._send(batch)
        for _ in batch:
            began = time.monotonic()
            line = self._line(limit_s) if sent else ""
            if not line:
                stalled = time.monotonic() - began >= limit_s
                why = f"took over {limit_s:g} s" if stalled else "ended its process"
                self.close()
                return [*values, self._failure(why)]
            got = json.loads(line)
            values.append(Value(got["terms"], False) if "terms" in got else self._failure(got["failed"], **got))
        return values

    def _failure(self, why: str, traceback: str = "", **_: Any) -> Value:
        if not self.failed:
            instead = f"such responses get {self.c.function_failed:g} (reward.function_failed)"
            self.say(f"Warning: reward.function {self.c.function} {why}; {instead}.\n{traceback}".rstrip())
        self.failed += 1
        return Value({"reward": self.c.function_failed}, True)

    def _start(self) -> None:
        """Start a worker and have it call the function on the sample."""
        paths = [p or os.getcwd() for p in sys.path]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([*paths, os.getcwd()]))}
        self._buffer = b""
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from lead_fast.reward.function import worker; worker()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,  # only the trainer handles Ctrl-C in the terminal
        )
        sent = self._send((self.c.function, self.sample))
        line = self._line(START_S) if sent else ""
        got = json.loads(line) if line else {"refused": f"reward.function {self.c.function} ended its process or took "
                                             f"over {START_S:g} s when it was first called."}  # fmt: skip
        if "terms" not in got:
            self.close()
            if got.get("traceback"):
                self.say(got["traceback"].rstrip())
            failed = f"reward.function {self.c.function} {got.get('failed')}"
            raise ValueError(got.get("refused") or f"{failed}; it was given a correct response to the first problem.")

    def _send(self, x: Any) -> bool:
        """Write to the worker; returns False if it has died or does not read within START_S."""
        assert self.process and self.process.stdin
        data, fd, until = memoryview(pickle.dumps(x)), self.process.stdin.fileno(), time.monotonic() + START_S
        os.set_blocking(fd, False)
        try:
            while data:
                if not select.select([], [fd], [], max(0.0, until - time.monotonic()))[1]:
                    return False
                data = data[os.write(fd, data) :]
        except BrokenPipeError:
            return False
        return True

    def _line(self, timeout_s: float) -> str:
        """The worker's next line; empty if none arrives in time or the worker has died."""
        assert self.process and self.process.stdout
        fd, until = self.process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if not select.select([fd], [], [], max(0.0, until - time.monotonic()))[0]:
                return ""
            if not (more := os.read(fd, 1 << 16)):
                return ""
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()

    def close(self) -> None:
        """End the worker and all processes that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe
                pipe.close()
            self.process = None
