"""Time the page that shows a run's kept rollouts: opening, paging, filtering, single groups; on generated files.

python bench/watch.py [--responses 100000] [--group_size 8] [--per_step 256] [--tokens 400]

It calls the page's own code without a server or browser, and prints the milliseconds of each kind of view (median and
longest). With the default 100,000 responses it takes under a minute on two CPU cores, most of it to make the files.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from lead_fast.records import Batch, Group, Problem, Response, Sample, Score
from lead_fast.runtime.rollouts import Rollouts, TokenValues
from lead_fast.view.server import Site


def make(folder: Path, responses: int, group_size: int, per_step: int, tokens: int) -> None:
    """Write steps of `per_step` responses with random tokens; half of the responses count as trained on."""
    rng = np.random.default_rng(0)
    words = [f"so ${i}+{i + 1}={2 * i + 1}$ and " for i in range(97)]
    store = Rollouts(folder, 10**12)
    for step in range(1, responses // per_step + 1):
        groups = []
        for i in range(per_step // group_size):
            samples = []
            for _ in range(group_size):
                ids = rng.integers(0, 32000, tokens).tolist()
                text = "".join(words[k % 97] for k in ids[: tokens // 8])
                response = Response(ids, rng.normal(-1, 1, tokens).tolist(), "stop", text, step - 1)
                samples.append(Sample(response, Score(bool(rng.random() < 0.5), "46", False, False)))
            groups.append(Group(Problem(str(i), f"Problem {i} of step {step}: what is $x^2$?", "46"), [1], samples))
        half = per_step // 2 * tokens
        values = TokenValues(
            np.repeat(np.arange(per_step // 2, dtype="i4"), tokens),
            np.tile(np.arange(tokens, dtype="i4"), per_step // 2),
            rng.normal(0, 0.1, half).astype("f2"),
            rng.random(half).astype("f2"),
        )
        store.add(step, Batch(groups), [1.0] * per_step, [0.5] * per_step, 1e-6, values)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in (("responses", 100_000), ("group_size", 8), ("per_step", 256), ("tokens", 400)):
        p.add_argument(f"--{name}", type=int, default=value)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), a.responses, a.group_size, a.per_step, a.tokens)
        files = [f.stat().st_size for f in (Path(folder) / "rollouts").iterdir()]
        count, mib = len(files) * a.per_step, sum(files) / 2**20
        print(f"{count} responses of {a.tokens} tokens, {len(files)} steps, {mib:.0f} MiB")
        site = Site(Path(folder), dict)

        def ms(path: str) -> float:
            began = time.perf_counter()
            site.answer(path)
            return 1e3 * (time.perf_counter() - began)

        print(f"open the list                {ms('/rollouts'):8.1f} ms")
        last = len(files)
        for name, paths in {
            "another page": [f"/rollouts?page={n}" for n in range(2, 40)],
            "filter and sort": [f"/rollouts?correct=yes&solve=1-99&sort=longest&page={n}" for n in range(1, 20)],
            "a group": [f"/group/{n}/1" for n in range(1, last, 1 + last // 40)],
            "a group, coloured tokens": [f"/group/{n}/1?colour=gap" for n in range(1, last, 1 + last // 40)],
        }.items():
            times = [ms(path) for path in paths]
            print(f"{name:<28} {statistics.median(times):8.1f} ms   longest {max(times):8.1f}")


if __name__ == "__main__":
    main()
