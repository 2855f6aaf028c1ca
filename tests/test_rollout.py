"""Work sharing, the backlog's books, and the checks of a sync, with the built-in engine."""

import random
import re
import threading
from typing import Any

import pytest
import torch

from lead_fast.cli import load_config
from lead_fast.learner.loss import check_agreement
from lead_fast.learner.model import load_model, load_tokenizer
from lead_fast.records import Batch, Group, Problem, Response, Sample, Score
from lead_fast.rollout.collect import Backlog
from lead_fast.rollout.engine import Sampling, Work, fingerprint
from lead_fast.rollout.sync import compare
from lead_fast.rollout.transformers_engine import TransformersEngine
from lead_fast.runtime.ranks import Ranks

pytestmark = pytest.mark.quick

NO_MESH: Any = None
ALONE = Ranks(0, 1, torch.device("cpu"), NO_MESH)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    c = load_config(["--rollout.batch_size=6"])
    return TransformersEngine(c, load_tokenizer(c.model), ALONE)


@pytest.mark.parametrize("most", [1, 3])
def test_engines_that_take_at_once_get_every_prompt_once(most):
    store = Work([], 1, []).store
    works = [Work([[1]] * 50, 1, [0] * 50, store, "step-1", 4) for _ in range(4)]
    got: list[list[int]] = [[] for _ in works]

    def run(k: int) -> None:
        while taken := works[k].take(most):
            got[k] += taken

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(i for g in got for i in g) == list(range(50))
    assert works[0].share == 13 and works[0].take(most) == []


def test_ranks_that_share_an_engine_take_the_same_prompts():
    store = Work([], 1, []).store
    first, second = (Work([[1]] * 5, 1, [0] * 5, store, "x", 1, {}, 2, member, 2) for member in range(2))
    assert [first.take(2), first.take(2), first.take(2)] == [[0, 1], [2, 3], [4]]
    assert [second.take(2), second.take(2), second.take(2)] == [[0, 1], [2, 3], [4]]
    first.finish(), second.finish(), first.finish(), second.finish()
    assert first.enough() and second.enough()


def test_a_result_does_not_depend_on_who_took_the_prompt(engine):
    prompts = [[5 + i, 9, 30] for i in range(6)]

    def run(*turns: int) -> dict[int, list[list[int]]]:
        """Two engines; `turns` says who takes next."""
        store = Work([], 2, []).store
        works = [Work(prompts, 2, list(range(40, 46)), store, "w", 2) for _ in range(2)]
        out: dict[int, list[Response]] = {}
        for turn in turns:
            work, take = works[turn], works[turn].take
            once = iter([take])  # one batch, then it is the next one's turn
            work.take = lambda most, once=once: next(once, lambda most: [])(most)
            out |= engine.generate(work, Sampling(12))
            work.take = take
        return {i: [r.token_ids for r in out[i]] for i in sorted(out)}

    assert run(0, 1) == run(1, 0) == run(0, 0)
    assert sorted(run(0, 1)) == list(range(6))


def graded(problem: int) -> Group:
    """Two samples, correct where the problem is odd."""
    sample = Sample(Response([1], [0.0], "stop", "", 0), Score(bool(problem % 2), None, False, False))
    return Group(Problem(str(problem), "", ""), [1], [sample, sample])


def test_every_problem_asked_is_trained_once_in_whatever_order_groups_end():
    rng = random.Random(0)
    backlog = Backlog(lambda at: at % 7, 3, 2, 0)  # a small data set, that comes round
    trained: list[int] = []
    for _ in range(40):
        asked = backlog.ask()
        assert len(asked) == 5
        done = sorted(rng.sample(range(5), rng.choice([3, 4, 5])))
        cut = {i: [Response([7], [0.0], "unfinished", "", 0)] * 2 for i in range(5) if i not in done}
        batch = backlog.settle(Batch([graded(asked[i]) for i in done], done, cut))
        now = [int(g.problem.id) for g in batch.groups]
        assert len(now) == 3 and [s.correct for s in batch.scores] == [bool(p % 2) for p in now for _ in range(2)]
        trained += now
    everything = [at % 7 for at in range(backlog.position)]
    assert sorted([*trained, *backlog.waiting]) == sorted(everything)
    assert Backlog(lambda at: at % 7, 3, 2, backlog.position, backlog.waiting).ask() == backlog.ask()


def test_without_extra_problems_nothing_waits():
    backlog = Backlog(lambda at: at, 3, 0, 6)
    assert backlog.ask() == [6, 7, 8] and backlog.begun == {}
    backlog.settle(Batch([graded(p) for p in (6, 7, 8)], [0, 1, 2]))
    assert backlog.ask() == [9, 10, 11]


def test_what_was_sent_is_compared_with_what_the_engine_holds(engine):
    named = dict(load_model(load_config([]).model).named_parameters())
    for p in named.values():
        p.requires_grad_(False)

    def sent() -> dict[str, tuple[float, float, int]]:
        return dict(zip(named, fingerprint(list(named.values())), strict=True))

    assert compare(sent(), engine, 1) is None
    name = "model.layers.2.mlp.up_proj.weight"
    assert f"left out {name}" in (compare({k: v for k, v in sent().items() if k != name}, engine, 1) or "")
    named[name][3, 5] += 1e-3
    assert name in (compare(sent(), engine, 1) or "") and "differs" in (compare(sent(), engine, 1) or "")


def test_a_difference_at_the_first_step_stops_the_run_and_never_advises_the_engine_in_use():
    c = load_config([])
    check_agreement(1e-5, 1e-4, c, "cpu")
    check_agreement(1.0, 1e-4, load_config(["--rollout.top_p=0.9"]), "cpu")
    for engine, other in (("auto", "vllm"), ("transformers", "vllm"), ("vllm", "transformers")):
        with pytest.raises(ValueError, match=r"by 0\.02 nats.*rounding in float32 explains 0\.0001") as e:
            check_agreement(0.02, 1e-4, load_config([f"--rollout.engine={engine}"]), "cpu")
        assert re.findall(r"--rollout\.engine=(\w+)", str(e.value)) == [other]
    with pytest.raises(ValueError, match="nan nats"):
        check_agreement(float("nan"), 1e-4, c, "cpu")
