"""Test work sharing, the backlog's bookkeeping and the checks of a sync, with the built-in engine."""

import random
import re
import threading
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lead_fast.cli import load_config
from lead_fast.learner.loss import check_agreement
from lead_fast.learner.model import load_model, load_tokenizer
from lead_fast.records import Batch, Group, Problem, Response, Sample, Score
from lead_fast.rollout import engine as engine_module
from lead_fast.rollout import vllm_engine
from lead_fast.rollout.backlog import Backlog
from lead_fast.rollout.engine import Sampling, Work, fingerprint
from lead_fast.rollout.sync import compare
from lead_fast.rollout.transformers_engine import TransformersEngine
from lead_fast.rollout.vllm_engine import VllmEngine, start_fault
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
    assert works[0].prompts_per_engine == 13 and works[0].take(most) == []


def test_ranks_that_share_an_engine_take_the_same_prompts():
    store = Work([], 1, []).store
    first, second = (Work([[1]] * 5, 1, [0] * 5, store, "x", 1, {}, 2, member, 2) for member in range(2))
    assert [first.take(2), first.take(2), first.take(2)] == [[0, 1], [2, 3], [4]]
    assert [second.take(2), second.take(2), second.take(2)] == [[0, 1], [2, 3], [4]]
    first.finish(0), second.finish(0), first.finish(1), second.finish(1)
    assert first.enough() and second.enough()


def test_a_result_does_not_depend_on_who_took_the_prompt(engine):
    prompts = [[5 + i, 9, 30] for i in range(6)]

    def run(*turns: int) -> dict[int, list[list[int]]]:
        """Run two engines; `turns` says which engine takes the next prompts."""
        store = Work([], 2, []).store
        works = [Work(prompts, 2, list(range(40, 46)), store, "w", 2) for _ in range(2)]
        out: dict[int, list[Response]] = {}
        for turn in turns:
            work, take = works[turn], works[turn].take
            once = iter([take])  # one batch, then the next turn
            work.take = lambda most, once=once: next(once, lambda most: [])(most)
            out |= engine.generate(work, Sampling(12))
            work.take = take
        return {i: [r.token_ids for r in out[i]] for i in sorted(out)}

    assert run(0, 1) == run(1, 0) == run(0, 0)
    assert sorted(run(0, 1)) == list(range(6))


def graded(problem: int) -> Group:
    """Make two samples per problem, correct for odd problems."""
    sample = Sample(Response([1], [0.0], "stop", "", 0), Score(bool(problem % 2), None, False, False))
    return Group(Problem(str(problem), "", ""), [1], [sample, sample])


def test_every_problem_asked_is_trained_once_in_whatever_order_groups_end():
    rng = random.Random(0)
    backlog = Backlog(lambda at: at % 7, 3, 2, 40)  # a small data set, which repeats
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
    assert Backlog(lambda at: at % 7, 3, 2, 40, backlog.state()).ask() == backlog.ask()


def test_without_extra_problems_nothing_waits():
    backlog = Backlog(lambda at: at, 3, 0, position=6)
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


def test_checksums_take_a_slice_of_memory_in_fp64_however_large_a_tensor_is(monkeypatch):
    monkeypatch.setattr(engine_module, "SLICE", 1 << 12)
    flat = torch.randn(1 << 18).bfloat16()
    turned = torch.randn(96, 1 << 11).t()  # not contiguous
    small = torch.ones(3, 1)
    live = {t.untyped_storage()._cdata: 0 for t in (flat, turned, small)}
    peak = 0

    class Peak(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, a=(), k=None):
            nonlocal peak
            out = f(*a, **(k or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in live:
                    storage = t.untyped_storage()
                    live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, live.pop, storage._cdata, None)
            peak = max(peak, sum(live.values()))
            return out

    with Peak():
        values = fingerprint([flat, turned, small])
    assert peak <= 4 * 8 * (1 << 12), f"{peak} bytes beside tensors of {flat.numel()} elements"
    for t, (total, squares, size) in zip([flat, turned, small], values, strict=True):
        x = t.double()
        assert size == t.numel() and total == pytest.approx(x.sum().item(), abs=1e-6)
        assert squares == pytest.approx(x.square().sum().item(), rel=1e-12)


class StubLLM:
    """Stub of vLLM that records its calls in order and returns `answers`."""

    def __init__(self, **answers: bool):
        self.asked: list[str] = []
        self.answers = {"weights": False, "kv_cache": True, "reset": True} | answers
        self.llm_engine = self
        self.model = torch.nn.Linear(2, 2, bias=False)
        self.model.load_weights = lambda bucket: self.asked.append("load")  # type: ignore[attr-defined]

    def wake_up(self, tags: list[str]) -> bool:
        self.asked += tags
        return self.answers[tags[0]]

    def apply_model(self, function: Any) -> list[Any]:
        out = function(self.model)
        if out is not None:
            self.asked.append("checksums")
        return [out]

    def reset_prefix_cache(self) -> bool:
        self.asked.append("reset")
        return self.answers["reset"]


def sleeping(llm: StubLLM, *, quantized: bool = False) -> VllmEngine:
    out = object.__new__(VllmEngine)
    out.llm, out.cpu, out.asleep, out.quantized, out.before = llm, False, True, quantized, {"old": (1.0, 1.0, 1)}
    if not quantized:
        out.before = {}
    return out


def test_vllm_is_checked_before_its_cache_takes_the_memory_and_its_answers_are_asserted():
    llm = StubLLM()
    vllm = sleeping(llm)
    vllm.load_weights(iter([[("weight", torch.ones(2, 2))]]), 3)
    assert llm.asked == ["weights", "load", "checksums", "kv_cache", "reset"] and vllm.version == 3
    assert [x.names for x in vllm.checksums()] == [("weight",)] and llm.asked[-1] == "reset"
    for answers, words in [({"weights": True}, "no room"), ({"kv_cache": False}, "did not wake"),
                           ({"reset": False}, "prefix cache")]:  # fmt: skip
        with pytest.raises(AssertionError, match=words):
            sleeping(StubLLM(**answers)).load_weights(iter([]), 1)


def test_rounded_weights_are_reloaded_layer_by_layer_between_waking_and_the_cache(monkeypatch):
    llm = StubLLM()
    llm.vllm_config = type("Config", (), {"model_config": None})  # type: ignore[attr-defined]
    monkeypatch.setattr(vllm_engine, "_begin_reload", lambda model: llm.asked.append("begin"))
    monkeypatch.setattr(vllm_engine, "_finish_reload", lambda model, shape: llm.asked.append("finish"))
    engine = sleeping(llm, quantized=True)
    engine.load_weights(iter([[("weight", torch.ones(2, 2))]] * 2), 3)
    assert llm.asked == ["weights", "begin", "load", "load", "finish", "checksums", "kv_cache", "reset"]
    assert engine.before == {"old": (0.0, 0.0, 0)}  # contents before the last sync say nothing about this one


def test_vllms_reason_and_a_remedy_that_is_not_the_engine_in_use():
    c = load_config([])
    memory = ValueError(
        "Free memory on device cuda:3 (10/79 GiB) on startup is less than desired GPU memory utilization"
    )
    sentence = start_fault(memory, c, 3)
    assert sentence.startswith("On rank 3 vLLM did not start with model.path tiny (ValueError: Free memory on device")
    assert sentence.endswith("lower rollout.gpu_memory.") and "transformers" not in sentence
    assert "raise rollout.tensor_parallel" in start_fault(torch.OutOfMemoryError("CUDA out of memory. Tried"), c, 0)
    try:
        try:
            raise OSError("no such symbol: cuFoo")
        except OSError as e:
            raise RuntimeError("Engine core initialization failed. See root cause above.") from e
    except RuntimeError as e:
        wrapped = start_fault(e, c, 0)
    assert "OSError: no such symbol: cuFoo; RuntimeError: Engine core" in wrapped and "give --debug" in wrapped
    pydantic = ValueError(
        "1 validation error for ModelConfig\n  Value error, Model architectures ['X'] are not supported"
    )
    assert "Value error, Model architectures ['X']" in start_fault(pydantic, c, 0)
    assert "rollout.engine=transformers, which is many times slower" in start_fault(pydantic, c, 0)


def test_a_sync_that_failed_does_not_advise_the_engine_in_use(engine, monkeypatch):
    from lead_fast.rollout import sync

    ranks = type("Ranks", (), {"gather_objects": lambda self, x: ["", x, x], "device": torch.device("cpu")})()
    monkeypatch.setattr(sync, "gathered_weights", lambda *a: iter([]))
    monkeypatch.setattr(sync, "compare", lambda *a: "After sync w differs")
    monkeypatch.setattr(engine, "load_weights", lambda buckets, version: None)
    for name, said in (("transformers", "report this"), ("vllm", "give --rollout.engine=transformers, or report this")):
        with pytest.raises(ValueError, match=f"w differs .rank 1.: {said}"):
            sync.publish(None, engine, 1, load_config([f"--rollout.engine={name}"]), ranks)  # type: ignore[arg-type]


def test_a_stop_string_that_began_before_a_response_was_cut_off_still_ends_it():
    vllm = object.__new__(VllmEngine)
    vllm.tokenizer = load_tokenizer(load_config([]).model)
    ids = vllm.tokenizer("Compute 3+4. The answer is 7. So", add_special_tokens=False)["input_ids"]
    pieces = [vllm.tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    end = next(n + 1 for n, text in enumerate(pieces) if "answer" in text)
    assert 1 < end < len(ids)
    for begun in range(1, end):  # cut off within the stop string or before it
        assert vllm._stop_across(begun, ids, ("answer",)) in (end, len(ids))
    assert vllm._stop_across(end - 1, ids, ("answer",)) == end
    assert vllm._stop_across(end - 1, ids, ("nothing",)) == vllm._stop_across(0, ids, ("answer",)) == len(ids)
