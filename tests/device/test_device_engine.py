"""vLLM beside the trainer on every device that has it: sleep, staged wake, sync in place, canary.

On a CPU nothing is dropped in sleep: there the order of calls and the weights are tested (make test-vllm's environment).
"""

import importlib.util
import json

import pytest
from jobs import succeeded, torchrun

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed: make test-vllm installs it for CPUs"
)

SCRIPT = """
import json, sys
import torch
from lead_fast.cli import load_config
from lead_fast.data.prompts import tokenize_prompts
from lead_fast.data.read import load_problems
from lead_fast.learner.model import load_tokenizer
from lead_fast.learner.optimizer import make_optimizer, update
from lead_fast.learner.packing import make_pack
from lead_fast.learner.policy import load_policy
from lead_fast.rollout.engine import Sampling, Work
from lead_fast.rollout.sync import canary, publish
from lead_fast.rollout.vllm_engine import VllmEngine
from lead_fast.runtime.ranks import start, stop

ranks = start()
c = load_config(["--data.instruction=", "--data.max_prompt_tokens=128", "--rollout.max_tokens=64",
                 "--rollout.engine=vllm", "--rollout.batch_size=8", "--rollout.gpu_memory=0.3", "--optim.lr=3e-3"])
tokenizer = load_tokenizer(c.model)
problems, prompts = tokenize_prompts(load_problems("arithmetic:test?n=8&seed=5", split="test"), tokenizer,
                                     instruction="", max_prompt_tokens=128)
policy = load_policy(c.model, c.parallel, ranks)
optimizer = make_optimizer(policy, c.optim)
engine = VllmEngine(c, tokenizer, ranks)
cuda = ranks.device.type == "cuda"

def used():
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
    return total - free

def addresses():
    return engine.llm.apply_model(lambda model: [p.data_ptr() for p in model.parameters()])[0]

def generate():
    return engine.generate(Work(prompts, 2, list(range(len(prompts)))), Sampling(32, 0.0))

def optimiser_step():
    pack = make_pack(range(4), prompts[:4], [[5 + i, 9, 30, 7] for i in range(4)], None, ranks.device)
    policy(pack, lambda h, w: -(h @ w.T).float().log_softmax(-1).gather(1, pack.targets_R[:, None]).mean()).backward()
    assert update(policy, optimizer, c.optim.lr, 1.0) > 0

out = {"device": ranks.device.type}
publish(policy, engine, 0, c, ranks)
out["canary"] = canary(policy, engine, prompts[0], c, ranks)
before, at, awake = generate(), addresses(), used()
engine.sleep()
out["dropped_bytes"] = awake - used()
stages, wake_up = [], engine.llm.wake_up
def watched(tags=None):
    result = wake_up(tags=tags)
    stages.append([tags, used()])
    return result
engine.llm.wake_up = watched
optimiser_step()
publish(policy, engine, 1, c, ranks)
engine.wake()
out["stages"], out["in_place"], out["awake_bytes"] = stages, addresses() == at, awake
out["canary_again"] = canary(policy, engine, prompts[0], c, ranks)
after = generate()
out["moved"] = any(a.token_ids != b.token_ids for i in before for a, b in zip(before[i], after[i]))
optimiser_step()
try:
    canary(policy, engine, prompts[0], c, ranks)
except ValueError as e:
    out["stale"] = str(e)
open(sys.argv[1], "w").write(json.dumps(out))
stop()
"""


@pytest.fixture(scope="module")
def saw(device, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("engine")
    (folder / "script.py").write_text(SCRIPT)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    succeeded(torchrun(1, str(folder / "script.py"), str(folder / "saw.json"), **hidden))
    found = json.loads((folder / "saw.json").read_text())
    assert found["device"] == device.type
    return found


def test_sleep_drops_weights_and_cache_and_the_wake_is_staged(saw, device):
    if device.type == "cpu":
        assert saw["dropped_bytes"] == 0 and not saw["stages"]
        return
    assert saw["dropped_bytes"] > 1 << 30  # nearly all is cache
    (first, with_weights), (second, with_cache) = saw["stages"]
    assert (first, second) == (["weights"], ["kv_cache"])
    assert with_weights < saw["awake_bytes"] - (1 << 29) < with_cache


def test_weights_arrive_in_place_and_are_used(saw):
    assert saw["in_place"] and saw["moved"]
    assert saw["canary"] < 1e-3 and saw["canary_again"] < 1e-3


def test_the_canary_refuses_stale_weights(saw):
    assert "the engine's log-probs differ from the trainer's" in saw["stale"]
