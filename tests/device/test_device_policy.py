"""Test a small policy on every device: gradients under FSDP2 against plain transformers on the CPU, in both dtypes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import succeeded, torchrun

from lead_fast.cli import load_config
from lead_fast.learner.loss import Objective, policy_loss
from lead_fast.learner.model import load_model
from lead_fast.learner.optimizer import make_optimizer, update
from lead_fast.learner.packing import make_pack
from lead_fast.learner.policy import make_policy
from lead_fast.runtime.ranks import Ranks

TEMPERATURE = 0.8
NEAR = {"cpu": 2e-5, "cuda": 1e-4}  # relative error that the order of float32 sums may cause


def sequences(n: int = 6) -> tuple[list[list[int]], list[list[int]], list[list[float]], torch.Tensor]:
    """Make prompts, responses, the engine's log-probs and advantages."""
    g = torch.Generator().manual_seed(2)

    def draw(most: int) -> list[int]:
        return torch.randint(4, 300, (int(torch.randint(2, most, (1,), generator=g)),), generator=g).tolist()

    responses = [draw(90) for _ in range(n)]
    logprobs = [(-3 * torch.rand(len(r), generator=g)).tolist() for r in responses]
    return [draw(9) for _ in range(n)], responses, logprobs, torch.randn(n, generator=g)


def plain_gradient(model: Any) -> dict[str, torch.Tensor]:
    """Compute the gradient of the clipped loss by transformers in float32 on the CPU, one sequence at a time."""
    prompts, responses, logprobs, advantages = sequences()
    model = copy.deepcopy(model).cpu().float()
    model.set_attn_implementation("eager")
    for p, r, old, a in zip(prompts, responses, logprobs, advantages, strict=True):
        logits = model(torch.tensor([p + r]), use_cache=False).logits[0, len(p) - 1 : -1] / TEMPERATURE
        logp = logits.log_softmax(-1).gather(1, torch.tensor(r)[:, None])[:, 0]
        ratio = (logp - torch.tensor(old)).exp()
        (-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / 100).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def packed_gradient(model: Any, ranks: Ranks, *args: str) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """Compute the trainer's gradient (FSDP2, packs, the head's kernel); also returns policy and configuration."""
    c = load_config([f"--rollout.temperature={TEMPERATURE}", *args])
    policy = make_policy(copy.deepcopy(model), None, c.model, c.parallel, ranks)
    prompts, responses, logprobs, advantages = sequences()
    weights = torch.full((len(prompts),), 0.01, device=ranks.device)
    o = Objective(advantages.to(ranks.device), weights)
    for members in ([0, 3], [1, 2, 4], [5]):
        pack = make_pack(members, prompts, responses, logprobs, ranks.device)
        policy_loss(policy, pack, o, c).loss.backward()
    policy.to_shards()
    found = {name: p.grad.full_tensor().cpu() for name, p in policy.model.named_parameters() if p.grad is not None}
    return found, policy, c


def flat(gradient: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> torch.Tensor:
    assert gradient.keys() == like.keys()
    return torch.cat([gradient[name].flatten().double() for name in like])


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(load_config([]).model)


@pytest.fixture(scope="module")
def reference(model) -> dict[str, torch.Tensor]:
    return plain_gradient(model)


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_the_gradient_is_the_cpus_in_float32(checkpointing, ranks, model, reference):
    args = ["--model.dtype=float32", f"--model.activation_checkpointing={checkpointing}"]
    got, *_ = packed_gradient(model, ranks, *args)
    a, b = flat(got, reference), flat(reference, reference)
    assert b.norm() > 0 and (a - b).norm() < NEAR[ranks.device.type] * b.norm()


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_the_gradient_is_the_cpus_but_for_rounding_in_bfloat16(checkpointing, ranks, model, reference):
    args = ["--model.dtype=bfloat16", f"--model.activation_checkpointing={checkpointing}"]
    got, policy, c = packed_gradient(model, ranks, *args)
    a, b = flat(got, reference), flat(reference, reference)
    assert torch.cosine_similarity(a, b, dim=0) > 0.98 and abs(a.norm() / b.norm() - 1) < 0.1
    if checkpointing == "none":  # FSDP2's master weights are float32 and change
        before = [p.full_tensor().clone() for p in policy.parameters()]
        assert all(p.dtype == torch.float32 for p in before)
        assert update(policy, make_optimizer(policy, c.optim), 1e-3, 1.0) > 0
        moved = [not torch.equal(x, p.full_tensor()) for x, p in zip(before, policy.parameters(), strict=True)]
        assert sum(moved) > 0.9 * len(moved)


EVERY_GPU = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_device_policy import load_config, load_model, packed_gradient
from lead_fast.runtime.ranks import start, stop
ranks = start()
got, *_ = packed_gradient(load_model(load_config([]).model), ranks, "--model.dtype=float32", "--parallel.reshard=true")
if ranks.main:
    torch.save(got, sys.argv[1])
stop()
"""


def test_every_gpu_of_the_machine_gives_the_same_gradient(gpu, reference, tmp_path):
    """Every rank adds the same packs, so the sum is that of one rank times the number of ranks."""
    if (n := torch.cuda.device_count()) < 2:
        pytest.skip("one GPU; tests/test_training.py compares ranks on the CPU")
    (tmp_path / "script.py").write_text(EVERY_GPU)
    here = str(Path(__file__).parent)
    succeeded(torchrun(n, str(tmp_path / "script.py"), str(tmp_path / "gradient.pt"), here))
    a, b = flat(torch.load(tmp_path / "gradient.pt"), reference), n * flat(reference, reference)
    assert (a - b).norm() < NEAR["cuda"] * b.norm()
