"""Test partial rollouts: waiting groups are trained on once and in time, and bias lengths for at most max_age steps."""

import heapq
import json
import random

import pytest
import torch

from lead_fast.checks import check, fit_quantized
from lead_fast.cli import load_config
from lead_fast.learner.learner import age_sums, weight_by_age
from lead_fast.learner.loss import mismatch
from lead_fast.learner.packing import make_pack
from lead_fast.records import Batch, Group, Problem, Response, Sample, Score
from lead_fast.rollout.backlog import Backlog, decoded, encoded
from lead_fast.rollout.engine import Sampling, Work
from lead_fast.rollout.vllm_engine import drafter
from lead_fast.runtime.journal import staleness

pytestmark = pytest.mark.quick

GROUP_SIZE, LIMIT = 4, 64


class FakeEngine:
    """Engine that decodes one token per response and iteration; lengths depend on the prompt alone."""

    def __init__(self) -> None:
        self.version = 0

    def lengths(self, prompt: list[int]) -> list[int]:
        rng = random.Random(prompt[0])
        return [min(LIMIT, max(1, round(rng.lognormvariate(3.3, 0.8)))) for _ in range(GROUP_SIZE)]

    def generate(self, work: Work, sampling: Sampling) -> dict[int, list[Response]]:
        asked = work.take(len(work.prompts))
        begun = {i: work.begun.get(i, [Response([], [], "unfinished", "", self.version)] * work.n) for i in asked}
        left = {
            i: max(n - r.length for n, r in zip(self.lengths(work.prompts[i]), begun[i], strict=True)) for i in asked
        }
        queue = [(t, i) for i, t in left.items()]
        heapq.heapify(queue)
        now = 0
        while queue and not work.enough():
            now, i = heapq.heappop(queue)
            work.finish(i)
        return {i: [self.continued(r, n, now) for r, n in zip(begun[i], self.lengths(work.prompts[i]), strict=True)]
                for i in asked}  # fmt: skip

    def continued(self, r: Response, length: int, iterations: int) -> Response:
        n = min(length, r.length + iterations)
        later = r.continued
        if 0 < r.length < n and r.parts[-1][0] != self.version:
            later = (*later, (self.version, r.length))
        version = r.policy_version if r.length else self.version
        return Response([7] * n, [-0.5] * n, "stop" if n == length else "unfinished", "", version, later)


def train(backlog: Backlog, steps: int, restart_at: int = -1):
    """Collect batches of so many steps; after `restart_at` of them the backlog is restored from a checkpoint."""
    engine = FakeEngine()
    for step in range(steps):
        if step == restart_at:
            state = json.loads(json.dumps(backlog.state()))
            backlog = Backlog(backlog.stream, backlog.size, backlog.extra, backlog.max_age, state)
        asked = backlog.ask()
        engine.version = step
        want = backlog.size if backlog.extra else None
        work = Work([[p] for p in asked], GROUP_SIZE, [0] * len(asked), begun=backlog.begun, want=want, due=backlog.due)
        came = engine.generate(work, Sampling(LIMIT))
        left = {i: r for i, r in came.items() if any(x.finish_reason == "unfinished" for x in r)}
        done = sorted(came.keys() - left.keys())
        score = Score(True, None, False, False)
        groups = [Group(Problem(str(asked[i]), "", ""), [asked[i]], [Sample(r, score) for r in came[i]]) for i in done]
        yield step, asked, backlog.settle(Batch(groups, done, left))


def mean_lengths(batch: Batch) -> list[float]:
    return [sum(s.response.length for s in g.samples) / GROUP_SIZE for g in batch.groups]


@pytest.mark.parametrize(("extra", "max_age"), [(2, 1), (8, 1), (8, 2), (16, 2), (5, 3), (24, 3)])
def test_every_group_is_trained_on_once_within_its_age_and_lengths_are_unbiased(extra, max_age):
    size, steps = 8, 251 + max_age
    lock_step = [x for _, _, b in train(Backlog(lambda at: at, size, 0), 250) for x in mean_lengths(b)]
    first_asked: dict[int, int] = {}
    trained: dict[int, int] = {}
    later, oldest = [], 0
    for step, asked, batch in train(Backlog(lambda at: at, size, extra, max_age), steps, restart_at=37):
        for p in asked:
            first_asked.setdefault(p, step)
        assert len(batch.groups) == size
        for g in batch.groups:
            p = int(g.problem.id)
            assert p not in trained, "a group was trained on twice"
            trained[p] = step
            oldest = max(oldest, step - first_asked[p])
            assert [s.response.length for s in g.samples] == FakeEngine().lengths([p])
        assert batch.counts["group_age_max"] <= max_age and batch.counts["groups_waiting"] == extra
        if step > max_age:
            later += mean_lengths(batch)
    assert oldest <= max_age
    late = [p for p, at in first_asked.items() if p not in trained and at < steps - max_age]
    assert not late, f"groups asked in time were never trained on: {late}"
    a, b = torch.tensor(lock_step), torch.tensor(later[:2000])
    assert len(a) == len(b) == 2000
    standard_error = (a.var() / len(a) + b.var() / len(b)).sqrt()
    assert abs(a.mean() - b.mean()) < 2 * standard_error


def test_dropping_what_is_late_would_bias_the_length():
    """Shows that the test above can fail: every step discards half of the groups, the longer ones."""
    engine, kept = FakeEngine(), []
    for step in range(250):
        lengths = sorted((engine.lengths([p]) for p in range(16 * step, 16 * step + 16)), key=max)
        kept += [sum(x) / GROUP_SIZE for x in lengths[:8]]
    everything = [x for _, _, b in train(Backlog(lambda at: at, 8, 0), 250) for x in mean_lengths(b)]
    a, b = torch.tensor(everything), torch.tensor(kept)
    assert a.mean() - b.mean() > 10 * (a.var() / len(a) + b.var() / len(b)).sqrt()


def test_the_length_bias_of_the_first_steps_is_measured_when_their_last_group_is_trained_on():
    books = {step: (batch, batch.counts) for step, _, batch in train(Backlog(lambda at: at, 8, 8, 2), 6)}
    reported = {b["length_bias_step"]: (step, b["length_bias"]) for step, (_, b) in books.items() if "length_bias" in b}
    step, bias = reported[1]
    asked = [sum(FakeEngine().lengths([p])) / GROUP_SIZE for p in range(16)]
    trained = mean_lengths(books[0][0])
    assert bias == pytest.approx((sum(trained) / 8) / (sum(asked) / 16) - 1) and bias < 0
    assert 1 <= step <= 2


def test_parts_of_a_response_know_who_made_them():
    r = Response([1] * 9, [0.0] * 9, "stop", "", 3, ((4, 2), (6, 7)))
    assert r.parts == [(3, 2), (4, 5), (6, 2)]
    assert Response([], [], "unfinished", "", 3).parts == []
    score = Score(True, None, False, False)
    batch = Batch(
        [Group(Problem("0", "", ""), [5], [Sample(r, score), Sample(Response([1], [0.0], "stop", "", 6), score)])]
    )
    assert batch.ages(6) == [[3] * 2 + [2] * 5 + [0] * 2, [0]]
    numbers = staleness(batch, 6)
    assert numbers["staleness_max"] == 3 and numbers["staleness_mean"] == pytest.approx(1.6)
    assert numbers["tokens_by_age"] == pytest.approx([0.3, 0.0, 0.5, 0.2])


def test_importance_weights_by_age():
    c = load_config(["--rollout.engine=vllm", "--rollout.extra_problems=8", "--rollout.max_age=3"])
    cpu = torch.device("cpu")
    parts = [make_pack([0, 1], [[5, 6], [5]], [[1, 2, 3], [4, 5]], [[-1.0, -1.0, -2.0], [-3.0, -0.5]], cpu, part,
                       [[3, 0, 0], [2, 2]]) for part in ((0, 2), (1, 2))]  # fmt: skip
    change = torch.tensor([0.1, 0.2, -0.3, 0.4, 30.0]).split([len(p.rows_R) for p in parts])
    sums: dict[str, float] = {}
    for pack, d in zip(parts, change, strict=True):
        assert pack.age_R is not None and pack.behavior_R is not None and len(pack.age_R) == len(pack.rows_R)
        for k, v in age_sums(pack.behavior_R + d, pack, c).items():
            sums[k] = sums.get(k, 0.0) + v.item()
    e = torch.tensor([0.1, 0.2, -0.3, 0.4, 20.0]).exp().tolist()
    weights = weight_by_age(sums, 3)
    assert weights[0] == pytest.approx((e[1] + e[2]) / 2) and weights[1] is None
    assert weights[2] == pytest.approx((e[3] + e[4]) / 2, rel=1e-5) and weights[3] == pytest.approx(e[0])


def test_unfinished_responses_survive_a_checkpoint_to_the_bit():
    logprobs = torch.randn(5).tolist()
    r = Response([1, 2, 3, 4, 151_643], logprobs, "unfinished", "a\u2028\ud800 b", 2, ((3, 4),))
    assert decoded(json.loads(json.dumps(encoded([r])))) == [r]


def test_more_extra_problems_than_max_age_can_train_on_are_refused():
    args = ["--rollout.engine=vllm", "--rollout.problems=8", "--rollout.extra_problems=17"]
    with pytest.raises(ValueError, match="give at most 16, or a higher rollout.max_age"):
        check(load_config(args), 2)
    check(load_config([*args, "--rollout.max_age=3"]), 2)


def test_a_quantised_rollout_brings_importance_weights_and_a_bound():
    args = ["--rollout.engine=vllm", "--rollout.kv_dtype=fp8"]
    c, said = fit_quantized(load_config(args), args)
    assert (c.loss.importance_cap, c.loss.importance_level, c.loss.old_logprobs) == (2.0, "token", "current")
    assert "importance_cap 2.0" in said[0] and "old_logprobs current" in said[0]
    check(c, 2)
    two = [*args, "--optim.updates=2"]
    assert fit_quantized(load_config(two), two)[0].loss.old_logprobs == "recompute"
    own = [*args, "--loss.importance_cap=5", "--loss.old_logprobs=recompute"]
    assert fit_quantized(load_config(own), own) == (load_config(own), [])
    for kept in ("--loss.importance_cap=none", "--loss.old_logprobs=engine"):
        with pytest.raises(ValueError, match="need importance weights"):
            check(fit_quantized(load_config([*args, kept]), [*args, kept])[0], 2)
    plain = load_config([])
    assert fit_quantized(plain, []) == (plain, [])
    with pytest.raises(ValueError, match="which only vLLM supports"):
        check(fit_quantized(load_config(args[1:]), args[1:])[0], 2)
    assert mismatch(0.049, c) == mismatch(float("nan"), c) == mismatch(9.0, plain) == ""
    assert "kl_behavior is 0.06 nats per token" in mismatch(0.06, c)


def test_drafters_that_cannot_be_used_are_refused():
    key = "--rollout.speculative"
    for args, words in [
        ([f"{key}.method=ngram"], "which only vLLM supports"),
        (["--rollout.engine=vllm", f"{key}.method=eagle3"], "needs the path or hub name of a drafter"),
        (["--rollout.engine=vllm", f"{key}.method=ngram", f"{key}.model=x"], "without a second model"),
        (["--rollout.engine=vllm", f"{key}.model=x"], "give a method, or no model"),
        (["--rollout.engine=vllm", f"{key}.method=mtp", "--rollout.min_p=0.1"], "cannot verify under min_p"),
    ]:
        with pytest.raises(ValueError, match=words):
            check(load_config(args), 2)


def test_what_vllm_is_told_of_a_drafter():
    key = "--rollout.speculative"
    assert drafter(load_config([]).rollout, 128) == {}
    r = load_config([f"{key}.method=draft_model", f"{key}.model=tiny"]).rollout
    told = drafter(r, 256)
    assert told["speculative_config"]["num_speculative_tokens_per_batch_size"] == [(1, 64, 3), (65, 256, 0)]
    assert told["speculative_config"]["model"].endswith("tiny") and told["sleep_preserve_parameter_names"] == [
        "draft.*"
    ]
    r = load_config([f"{key}.method=ngram"]).rollout
    assert drafter(r, 64)["speculative_config"]["num_speculative_tokens_per_batch_size"] is None
    assert drafter(r, 64)["sleep_preserve_parameter_names"] == []


@pytest.mark.parametrize(("extra", "max_age"), [(0, 1), (4, 1), (24, 3)])
def test_a_run_resumed_with_other_limits_loses_no_group(extra, max_age):
    before = Backlog(lambda at: at, 8, 24, 3)
    trained = [int(g.problem.id) for _, _, b in train(before, 5) for g in b.groups]
    assert len(before.waiting) == 24 and any(before.begun.values())
    again = Backlog(before.stream, 8, extra, max_age, json.loads(json.dumps(before.state())))
    assert again.waiting == before.waiting and again.begun == before.begun
    for step, _, batch in train(again, 8):
        assert len(batch.groups) == 8
        trained += [int(g.problem.id) for g in batch.groups]
        once_more = Backlog(again.stream, 8, extra, max_age, json.loads(json.dumps(again.state())))
        assert once_more.waiting == again.waiting, f"step {step} of the resumed run does not survive a checkpoint"
    assert len(set(trained)) == len(trained) == 13 * 8
    assert sorted([*trained, *again.waiting]) == list(range(again.position))
