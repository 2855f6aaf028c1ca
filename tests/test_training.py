"""The loop on real FSDP ranks: one gradient however the batch is cut, resume, two ranks end to end, the export."""

import json
from collections.abc import Callable
from functools import cache

import pytest
import torch
from jobs import records, small, succeeded, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

from lead_fast import train
from lead_fast.cli import load_config
from lead_fast.learner.attention import attention_groups, take
from lead_fast.learner.head import Head
from lead_fast.learner.loss import objective, pack_logprobs, policy_loss
from lead_fast.learner.model import load_model
from lead_fast.learner.packing import (
    Pack,
    assign,
    assign_shared,
    efficiency,
    flops_per_sequence,
    make_pack,
    shared_work,
)
from lead_fast.learner.policy import Policy

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------ packing


def sequences(seed: int, n: int = 7) -> tuple[list[list[int]], list[list[int]]]:
    g = torch.Generator().manual_seed(seed)

    def draw(most: int) -> list[int]:
        size = int(torch.randint(1, most, (1,), generator=g))
        return torch.randint(4, 300, (size,), generator=g).tolist()

    return [draw(9) for _ in range(n)], [draw(40) for _ in range(n)]


def logprobs_of(policy: Policy, pack: Pack) -> torch.Tensor:
    def head(hidden: torch.Tensor, head: Head) -> torch.Tensor:
        return (hidden @ head.weight.T).log_softmax(-1).gather(1, pack.targets_R[:, None])[:, 0]

    with torch.no_grad():
        return policy(pack, head)


@pytest.mark.quick
def test_packed_equals_unpacked():
    config = load_config([]).model
    policy = Policy(load_model(config))
    plain = load_model(config)
    prompts, responses = sequences(0)
    pack = make_pack(range(7), prompts, responses, None, CPU)
    expected = []
    for p, r in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logp = plain(torch.tensor([p + r]), use_cache=False).logits[0].log_softmax(-1)
        expected += [logp[len(p) - 1 + i, t] for i, t in enumerate(r)]
    torch.testing.assert_close(logprobs_of(policy, pack), torch.stack(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.quick
def test_a_sequences_tokens_never_touch_anothers_result():
    policy = Policy(load_model(load_config([]).model))
    prompts, responses = sequences(1)
    pack = make_pack(range(7), prompts, responses, None, CPU)
    before = logprobs_of(policy, pack)
    prompts[2] = [(t + 7) % 300 for t in prompts[2]]
    changed = make_pack(range(7), prompts, responses, None, CPU)
    after = logprobs_of(policy, changed)
    mine = pack.sequence_ids_R == 2
    assert torch.equal(before[~mine], after[~mine])
    assert not torch.allclose(before[mine], after[mine])


@pytest.mark.quick
def test_attention_groups_cover_every_sequence_once_and_waste_little():
    lengths = [3, 90, 50, 49, 51, 4, 100, 1]
    groups = attention_groups(lengths)
    assert sorted(i for g in groups for i in g) == list(range(8))
    assert all(lengths[i] >= 0.75 * max(lengths[j] for j in g) for g in groups for i in g)


@pytest.mark.quick
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_packs_hold_everything_once_within_the_budget_and_ranks_get_the_same_number(ranks):
    g = torch.Generator().manual_seed(ranks)
    lengths = torch.empty(256).log_normal_(8.3, 0.6, generator=g).clamp(max=14336).int().tolist()
    cost = flops_per_sequence(14_000_000_000, 48, 5120)
    plan = assign(lengths, 16384, ranks, cost)
    assert sorted(i for rank in plan for pack in rank for i in pack) == list(range(256))
    assert len({len(rank) for rank in plan}) == 1
    assert all(sum(lengths[i] for i in pack) <= 16384 for rank in plan for pack in rank)
    assert efficiency(plan, lambda pack: sum(cost(lengths[i]) for i in pack)) > 0.97


@pytest.mark.quick
def test_responses_to_one_prompt_share_its_tokens_and_nothing_else_changes():
    policy = Policy(load_model(load_config([]).model))
    prompts, responses = sequences(2)
    prompts = [prompts[i] for i in (0, 0, 0, 1, 2, 2, 0)]
    responses[1] = responses[1][:1]  # no token of its own: its one row is the prompt's last
    apart, shared = (make_pack(range(7), prompts, responses, None, CPU, shared=s) for s in (False, True))
    spared = 2 * len(prompts[0]) + len(prompts[4])  # the last one does not stand beside its like
    assert len(shared.input_ids_T) == len(apart.input_ids_T) - spared and apart.prefixes == []
    assert shared.prefixes.count((0, len(prompts[0]))) == 1 and len(shared.prefixes) == len(shared.lengths) == 6
    assert shared.cu_seqlens.diff().tolist() == shared.lengths
    for name in ("targets_R", "sequence_ids_R"):
        assert torch.equal(getattr(shared, name), getattr(apart, name))
    torch.testing.assert_close(logprobs_of(policy, shared), logprobs_of(policy, apart), atol=1e-5, rtol=1e-5)
    other = [[*responses[0][:-1], 7], *responses[1:]]
    other[2] = [t + 1 for t in responses[2]]  # its neighbours see the prompt alone
    after = logprobs_of(policy, make_pack(range(7), prompts, other, None, CPU, shared=True))
    of_neighbours = shared.sequence_ids_R > 2
    torch.testing.assert_close(after[of_neighbours], logprobs_of(policy, shared)[of_neighbours], atol=1e-5, rtol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("mode", ["official", "gspo", "cispo", "reference"])
def test_in_float64_the_gradient_does_not_depend_on_packs_and_shared_prompts(mode):
    config = load_config(["--rollout.group_size=4", *MODES[mode]])
    policy = Policy(load_model(config.model, torch.float64))
    g = torch.Generator().manual_seed(6)
    prompts, responses = sequences(6, 16)
    prompts = [prompts[i // 4 * 4] for i in range(16)]
    prompts[12:] = [[7]] * 4
    logprobs = [(-3 * torch.rand(len(r), generator=g)).tolist() for r in responses]
    advantage, kept = torch.randn(16, generator=g), torch.ones(16, dtype=torch.bool)
    o = objective(advantage, [len(r) for r in responses], kept, config)

    def gradient(packs: int, shared: bool) -> torch.Tensor:
        policy.zero_grad(set_to_none=True)
        for first in range(packs):
            pack = make_pack(range(16)[first::packs], prompts, responses, logprobs, CPU, shared=shared)
            reference = pack_logprobs(policy, pack, 1.0) - 0.1 * (pack.targets_R % 5)
            policy_loss(policy, pack, o, config, reference_R=reference if config.loss.kl_coef else None).loss.backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    whole = gradient(1, False)
    assert whole.dtype == torch.float64 and whole.norm() > 0
    assert (gradient(3, False) - whole).norm() <= 1e-12 * whole.norm()
    for packs in (1, 3):  # the model's norms compute in float32 all the same, and round what differs by 1e-16
        assert (gradient(packs, True) - whole).norm() <= 1e-7 * whole.norm()


@pytest.mark.quick
def test_a_shared_prompts_gradient_has_the_same_bits_with_several_threads():
    g, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    x = torch.randn(8, 64, generator=g, requires_grad=True)
    index, grad = torch.arange(8).repeat(500), torch.randn(4000, 64, generator=g)
    torch.set_num_threads(4)
    try:
        first, *others = (torch.autograd.grad(take(x, index), x, grad)[0] for _ in range(10))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.quick
def test_empty_responses_and_prompts_of_one_token_share_too():
    prompts, responses = [[7], [7], [7], [7], [8, 9]], [[], [5, 6], [], [4], []]
    apart, shared = (make_pack(range(5), prompts, responses, None, CPU, shared=s) for s in (False, True))
    assert apart.input_ids_T.tolist() == [7, 5, 7, 8] and shared.input_ids_T.tolist() == [7, 5, 8]
    assert apart.rows_R.tolist() == [0, 1, 2] and shared.rows_R.tolist() == [0, 1, 0]
    assert shared.targets_R.tolist() == [5, 6, 4] and shared.sequence_ids_R.tolist() == [1, 1, 3]
    assert shared.lengths == [2, 1] and shared.prefixes == []


@pytest.mark.quick
@pytest.mark.parametrize("groups, size, ranks", [(32, 8, 2), (1, 64, 2), (3, 5, 1), (2, 1, 4), (7, 8, 8), (0, 0, 2)])
def test_responses_to_one_prompt_stay_together_as_far_as_balance_allows(groups, size, ranks):
    g = torch.Generator().manual_seed(groups)
    own = torch.randint(0, 300, (groups * size,), generator=g).tolist()
    prompts = [[i // size] * 40 for i in range(groups * size)]
    lengths = [40 + n for n in own]
    cost = flops_per_sequence(1_000_000, 4, 128)
    plan = assign_shared(prompts, lengths, 2000, ranks, cost)
    packs = [pack for rank in plan for pack in rank]
    assert sorted(i for pack in packs for i in pack) == list(range(groups * size))
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
    assert all(sum(lengths[i] for i in pack) <= 2000 for pack in packs)  # as many keys as attention holds
    responses = [[1] * (n - 40 + 1) for n in lengths]
    sizes = [len(make_pack(p, prompts, responses, None, CPU, shared=True).input_ids_T) for p in packs if p]
    in_packs = sum(len({prompts[i][0] for i in pack}) for pack in packs)
    assert sum(sizes) == sum(own) + 40 * in_packs  # the responses to a prompt in one pack are neighbours
    apart = assign(lengths, 2000, ranks, cost)

    def slowest(plan: list) -> float:
        return max(sum(shared_work(pack, prompts, lengths, cost) for pack in rank) for rank in plan)

    assert slowest(plan) <= slowest(apart)
    if groups * size > 50:
        assert efficiency(plan, lambda pack: shared_work(pack, prompts, lengths, cost)) > 0.9
    if groups == 32:
        assert in_packs < 1.5 * groups and slowest(plan) < 0.85 * slowest(apart)


# --------------------------------------------------------------------------------------- one gradient however it is cut

GRADIENT = """
import json, sys, torch
from lead_fast.learner import advantage
from lead_fast.cli import load_config
from lead_fast.runtime.ranks import start, stop
from lead_fast.learner.loss import needs_gradient, objective, pack_logprobs, policy_loss
from lead_fast.learner.policy import load_policy
from lead_fast.learner.packing import assign, assign_shared, make_pack
from lead_fast.records import Score

world = start().world
g = torch.Generator().manual_seed(3)
draw = lambda most: torch.randint(4, 300, (int(torch.randint(2, most, (1,), generator=g)),), generator=g).tolist()
groups = [draw(9) for _ in range(4)]
groups[3] = groups[3][:1]
prompts = [p for p in groups for _ in range(4)]
responses = [draw(40) for _ in range(16)]
behavior = [(-3 * torch.rand(len(r), generator=g)).tolist() for r in responses]
outcomes = [1,0,1,0, 0,0,0,0, 1,1,1,1, 0,1,0,0]
lengths = [len(r) for r in responses]
whole = [len(p) + n - 1 for p, n in zip(prompts, lengths)]

policies = {}

def gradient(args, reshard, prune, shuffle, packs, checkpointing, sequence=1, replicate=1, offload="none",
             share=False):
    c = load_config(["--rollout.group_size=4", f"--model.activation_checkpointing={checkpointing}", *args,
                     f"--parallel.reshard={reshard}", f"--parallel.sequence={min(sequence, world)}",
                     f"--parallel.replicate={min(replicate, world)}", f"--parallel.offload={offload}"])
    kind = c.model, c.parallel
    if kind not in policies:
        ranks = start(c.parallel)
        policies[kind] = ranks, load_policy(c.model, c.parallel, ranks)
    ranks, policy = policies[kind]
    policy.zero_grad(set_to_none=True)
    scored = [Score(bool(o), None, False, False) for o in outcomes], lengths, c, ranks.device
    lead = advantage.advantages(*scored)
    o = objective(lead.advantage, lengths, lead.kept.repeat_interleave(4), c, advantage.outcomes(*scored))
    live = [i for i, moves in enumerate(needs_gradient(o, c)) if moves or not prune]
    if shuffle:
        live = live[::-1]
    if packs == "budget":
        lengths_live = [whole[i] for i in live]
        plan = (assign_shared([prompts[i] for i in live], lengths_live, 100, ranks.teams, float) if share
                else assign(lengths_live, 60, ranks.teams, float))
    else:  # dealt out like cards; with more packs than sequences some are empty
        hands = packs * ranks.teams
        deal = [list(range(len(live)))[h::hands] for h in range(hands)]
        plan = [deal[r :: ranks.teams] for r in range(ranks.teams)]
    loss = torch.zeros(())
    part = ranks.member, ranks.sequence
    for members in plan[ranks.team]:
        pack = make_pack([live[i] for i in members], prompts, responses, behavior, ranks.device, part, shared=share)
        ref_R = pack_logprobs(policy, pack, 1.0) - 0.1 * (pack.targets_R % 5) if c.loss.kl_coef else None
        out = policy_loss(policy, pack, o, c, reference_R=ref_R)
        out.loss.backward()
        loss += out.loss.detach()
    policy.to_shards()
    grads = [p.grad.full_tensor().flatten() for p in policy.parameters()]
    return ranks.all_sum(loss), torch.cat(grads), len(live), len(plan[0]), out.logprobs

specs = json.loads(sys.argv[1])
results = {name: gradient(**spec) for name, spec in specs.items()}
if torch.distributed.get_rank() == 0:
    torch.save(results, sys.argv[2])
stop()
"""

PLAIN = {"reshard": False, "prune": True, "shuffle": False, "packs": 1, "checkpointing": "none"}
ALL = 16  # packs: as many as there are sequences, so that on several ranks some are empty
CUTS = {
    f"{packs} packs, {'pruned' if prune else 'not pruned'}": {"packs": packs, "prune": prune, "shuffle": packs == 3}
    for packs in (1, 3, ALL)
    for prune in (True, False)
} | {
    "by budget, shuffled": {"packs": "budget", "shuffle": True},
    "3 packs, not pruned, resharded, checkpointed": {
        "packs": 3, "prune": False, "reshard": True, "checkpointing": "full"},
    "3 packs, selectively checkpointed": {"packs": 3, "checkpointing": "selective"},
    "3 packs, inputs and optimiser in host memory": {"packs": 3, "checkpointing": "full", "offload": "both"},
    "3 packs, 2 copies (HSDP), resharded": {"packs": 3, "replicate": 2, "reshard": True},
    "3 packs, not pruned, shared by 2 (Ulysses), checkpointed": {
        "packs": 3, "prune": False, "sequence": 2, "checkpointing": "full"},
    "1 packs, shared by 2 (Ulysses)": {"sequence": 2},
    "1 packs, prompts once, checkpointed": {"share": True, "checkpointing": "full"},
    f"{ALL} packs, prompts once": {"packs": ALL, "share": True},
    "3 packs, not pruned, prompts once": {"packs": 3, "prune": False, "share": True},
    "3 packs, prompts once, shared by 2 (Ulysses)": {"packs": 3, "share": True, "sequence": 2},
    "by budget, prompts once": {"packs": "budget", "share": True},
    "3 packs, 2 copies, shared by 2, shuffled": {"packs": 3, "replicate": 2, "sequence": 2, "shuffle": True},
}  # fmt: skip
WHOLE = "1 packs, pruned"
MODES = {
    "paper": [],
    "official": ["--preset=official", "--rollout.stop=[]"],
    "gspo": ["--loss.ratio=sequence", "--loss.mean=token"],
    "cispo": ["--loss.ratio=cispo", "--loss.mean=constant"],
    "dapo, groups dropped": ["--loss.clip_high=0.28", "--loss.mean=token", "--advantage.group_filter=uniform"],
    "reference": ["--loss.kl_coef=0.1"],
    "entropy, capped": ["--loss.entropy_coef=1e-2", "--loss.importance_cap=2.0", "--loss.dual_clip=3.0"],
}


CASES = [
    (m, c)
    for m in MODES
    for c in CUTS
    if m in ("paper", "dapo, groups dropped") or "not pruned" in c or "by" in c
    if not (m == "gspo" and "shared" in c)
]


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> Callable[[int], dict]:
    """Loss, gradient, live sequences and packs of every mode and cut, on so many ranks.

    On 0 ranks: of every mode in one pack on one rank, with which all others are compared.
    """
    folder = tmp_path_factory.mktemp("gradients")
    (folder / "gradient.py").write_text(GRADIENT)

    @cache
    def computed(ranks: int) -> dict:
        specs = {f"{m}/{c}": {"args": MODES[m], **PLAIN, **CUTS[c]} for m, c in CASES}
        if ranks == 0:
            specs = {f"{m}/{WHOLE}": {"args": MODES[m], **PLAIN} for m in MODES}
            specs |= {"half": {"args": ["--model.dtype=bfloat16"], **PLAIN}}
        out = folder / f"{ranks}.pt"
        succeeded(torchrun(max(1, ranks), str(folder / "gradient.py"), json.dumps(specs), str(out)))
        return torch.load(out)

    return computed


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode,cut", CASES)
def test_ranks_packs_and_order_give_the_same_gradient(mode, cut, ranks, gradients):
    loss, grad, live, *_ = gradients(0)[f"{mode}/{WHOLE}"]
    other_loss, other, other_live, packs, _ = gradients(ranks)[f"{mode}/{cut}"]
    assert grad.norm() > 0 and (packs > 0 if "budget" in cut else packs == int(cut.split()[0]))
    assert (live < 16) == (mode not in ("entropy, capped", "reference")) and other_live == (
        16 if "not pruned" in cut else live
    )
    # A token's gradient is proportional to exp(log-prob - engine's), whose relative error is the log-prob's absolute
    # one, some 1e-6 in float32. With other draws one token may dominate, and off by 4e-6 is rounding too; what is no
    # rounding shows in float64, above.
    assert abs(loss - other_loss) <= 1e-6 * max(1.0, abs(loss))
    assert (grad - other).norm() <= 1e-6 * grad.norm()


def test_bfloat16_computes_the_same_with_a_float32_loss(gradients):
    loss, grad, *_, logprobs = gradients(0)[f"paper/{WHOLE}"]
    half_loss, half, *_, half_logprobs = gradients(0)["half"]
    assert half_loss.dtype == half_logprobs.dtype == half.dtype == torch.float32
    assert not torch.equal(half_logprobs, half_logprobs.bfloat16().float())  # not rounded on the way out
    assert (half_logprobs - logprobs).abs().max() < 0.3 and not torch.equal(half, grad)
    assert torch.cosine_similarity(half, grad, dim=0) > 0.99


# ----------------------------------------------------------------------------------------------------------- end to end


def test_two_ranks_end_to_end(tiny_run):
    steps, evals = records(tiny_run, "train"), records(tiny_run, "eval")
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5] and [r["step"] for r in evals] == [0, 5]
    wanted = {"reward_mean", "accuracy", "solve_rate_histogram", "solve_none", "solve_all", "length_correct",
              "length_wrong", "truncated_share", "difficulty_weight_mean", "entropy", "clip_low_share",
              "clip_high_share", "grad_norm", "tokens_per_s", "seconds", "packing_efficiency"}  # fmt: skip
    assert wanted <= set(steps[0]) and {"rollout", "reward", "train", "optim", "sync"} <= set(steps[0]["seconds"])
    assert any(r["grad_norm"] > 0 for r in steps) and sum(steps[0]["solve_rate_histogram"]) == 4
    # At step 1 engine and policy hold the same weights: their log-probs agree.
    assert steps[0]["logprob_diff_max"] is None or steps[0]["logprob_diff_max"] < 1e-3
    for name in ("config.toml", "responses.jsonl", "report.html", "accuracy.png", "length.png", "difficulty.png"):
        assert (tiny_run / name).stat().st_size > 0
    assert list((tiny_run / "tensorboard").glob("events*"))


def test_weights_reach_the_engine_after_every_step(tiny_run):
    """With stale weights in the engine the difference grows with every update; fresh ones keep it at rounding."""
    diffs = [r["logprob_diff_max"] for r in records(tiny_run, "train") if r["logprob_diff_max"] is not None]
    assert diffs and max(diffs) < 1e-3


def test_the_export_loads_and_generates(tiny_run):
    model = AutoModelForCausalLM.from_pretrained(tiny_run / "final")
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "final")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Compute 3+4."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]
    assert model.dtype == torch.float32 and len(tokenizer) == model.config.vocab_size
    start = load_model(load_config([]).model).state_dict()
    assert any(not torch.equal(v, start[k]) for k, v in model.state_dict().items())


def test_a_run_is_never_written_over(tiny_run, single_rank):
    with pytest.raises(ValueError, match="already holds a run"):
        train.main(small(tiny_run.parent, f"--output={tiny_run}"))
