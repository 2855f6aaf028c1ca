"""The planner: its memory against a measured step, its arithmetic against hand computations, its advice against itself.

Memory is measured as resident memory of real ranks (VmHWM of a second step, less what is left when the model is gone),
with malloc told to give every large tensor pages of its own, so that what is freed is gone.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from jobs import ROOT, succeeded, torchrun
from step_memory import LENGTHS, SETTINGS, config, shape

from lead_fast import plan
from lead_fast.config import Config
from lead_fast.learner import fake_step
from lead_fast.learner.fake_step import KINDS, SEGMENTS, Numbers, fake_job, track


def numbers(c: Config, layers: int, tokens: int, on_gpu: bool = True, gpus: int = 8) -> Numbers:
    with fake_job(gpus, 1) as ranks:
        return track(c, shape(layers), ranks, [tokens], tokens, on_gpu)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, int]:
    """Bytes that a step of 25 million parameters takes on each of two ranks, by setting."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no peak of resident memory here")
    found = tmp_path_factory.mktemp("measured") / "found.json"
    succeeded(torchrun(2, str(ROOT / "tests" / "step_memory.py"), str(found), MALLOC_MMAP_THRESHOLD_="65536"))
    return json.loads(found.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_predicted_memory_is_within_a_tenth_of_a_measured_step(measured, name):
    with fake_job(2, 1) as ranks:
        n = track(config(*SETTINGS[name]), shape(8), ranks, LENGTHS, sum(LENGTHS) - len(LENGTHS), on_gpu=False)
    kinds = plan.peak(n)[1]
    predicted = sum(kinds.values())
    assert abs(predicted / measured[name] - 1) < 0.1, (kinds, measured[name])
    for forgotten in ("optimiser", "activations"):
        assert abs((predicted - kinds[forgotten]) / measured[name] - 1) > 0.1, f"{forgotten} would not be missed"


@pytest.mark.parametrize("reshard", ["true", "false"])
@pytest.mark.parametrize("checkpointing", plan.settings())
@pytest.mark.parametrize("tokens", [256, pytest.param(4096, marks=pytest.mark.slow)])
def test_two_depths_tell_what_the_whole_depth_would(monkeypatch, checkpointing, reshard, tokens):
    c = config(checkpointing, reshard, "--model.dtype=bfloat16")
    drawn = numbers(c, 7, tokens)
    monkeypatch.setattr(fake_step, "DEPTHS", (7, 8))
    whole = numbers(c, 7, tokens)
    assert drawn == pytest.approx(whole, rel=1e-6)


def test_traffic_of_a_pack_is_the_closed_form():
    block, root = 4 * 512 * 512 + 3 * 512 * 1280 + 3 * 512 + 2 * 512, 8192 * 512 + 512  # with q, k, v biases and norms
    n = numbers(config("full", "true", "--model.dtype=bfloat16"), 4, 512)
    assert n["parameters"] == 4 * block + root
    assert n["all_gather_calls"] == 2 * 4 + 1 and n["all_gather_bytes"] == 2 * (2 * 4 * block + root)
    assert n["reduce_scatter_calls"] == 4 + 1 and n["reduce_scatter_bytes"] == 4 * (4 * block + root)
    assert n["sync_bytes"] == 2 * (4 * block + root)
    once = numbers(config("full", "false", "--model.dtype=bfloat16"), 4, 512)
    assert once["all_gather_bytes"] == 2 * (4 * block + root)
    assert once["reduce_scatter_bytes"] == n["reduce_scatter_bytes"]


def test_flops_of_a_pack_are_the_closed_form():
    blocks, head, T = 4 * (4 * 512 * 512 + 3 * 512 * 1280), 8192 * 512, 512
    rope = T * 64  # of the angles, which transformers before 5.19 takes by a product: 2 T x half the head dim
    assert numbers(config("none"), 4, T)["gemm_flops"] - 6 * T * (blocks + head) in (0, rope)
    full = numbers(config("full"), 4, T)
    last = 512 * 1280  # recomputing stops before a block's last product, whose result nobody needs
    assert full["gemm_flops"] - T * (8 * blocks - 2 * 4 * last + 6 * head) in (0, rope)
    assert full["attention_forward_calls"] == 8 and full["attention_backward_calls"] == 4


def test_reshard_frees_the_gathered_blocks():
    block = 4 * 512 * 512 + 3 * 512 * 1280 + 3 * 512 + 2 * 512
    gathered = {
        (reshard, layers): numbers(config("full", reshard, "--model.dtype=bfloat16"), layers, 512)[
            "forward/gathered parameters"
        ]
        for reshard in ("true", "false")
        for layers in (4, 6)
    }
    assert gathered["false", 6] - gathered["false", 4] == 2 * 2 * block
    assert gathered["true", 6] == gathered["true", 4] <= gathered["false", 4] - 2 * block


def test_a_budget_fits_and_a_granule_more_does_not():
    c = config("none", "true", "--model.dtype=bfloat16")

    def tracked(tokens: int) -> Numbers:
        return numbers(c, 3, tokens)

    limit = plan.training_bytes(tracked(10_000))
    most, seen = plan.budget(tracked, limit, 4096)
    assert most % plan.GRANULE == 0 and most in seen and 9_000 < most <= 10_000
    assert plan.training_bytes(tracked(most)) <= limit < plan.training_bytes(tracked(most + plan.GRANULE))
    assert plan.budget(tracked, plan.aside("context"), 4096)[0] == 0


def test_mfu_by_hand():
    N, L, D = 1000, 3, 10
    lengths = [5, 7]
    found = plan.mfu(lengths, lambda n: 2 * N * n + 2 * L * D * n * n, 2.0, 4, plan.DEVICES["h100"])
    causal = sum((6 * N + 6 * L * D * n) * n for n in lengths)
    torchtitan = sum((6 * N + 12 * L * D * n) * n for n in lengths)
    assert found == pytest.approx({k: v / (2.0 * 4 * 989e12) for k, v in
                                   {"causal": causal, "torchtitan": torchtitan}.items()})  # fmt: skip


def test_seconds_of_a_collective_and_of_generation():
    d = plan.DEVICES["h100"]
    near = plan.collective_s("all_gather", 8e9, 0, 8, False, d)
    assert near == pytest.approx(7e9 / (450e9 * plan.assumed("collective")))
    assert plan.collective_s("all_reduce", 8e9, 0, 8, True, d) == pytest.approx(2 * near * 450 / 50)
    assert plan.collective_s("all_gather", 8e9, 9, 1, False, d) == 0
    one, two, waves = (plan.decode_s([64] * n, 2, 1e9, 1e5, d) for n in (1, 2, 4))
    assert one < two < 1.1 * one and waves == pytest.approx(2 * two)


@pytest.fixture
def model(tmp_path) -> str:
    shape(6).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def asked(model: str, *args: str) -> Config:
    return config("none", "false", f"--model={model}", "--model.dtype=bfloat16", "--rollout.max_tokens=2048",
                  "--parallel.pack_tokens=16384", *args)  # fmt: skip


@pytest.mark.slow
def test_what_does_not_fit_fits_with_the_remedy(monkeypatch, model):
    small = dataclasses.replace(plan.DEVICES["h100"], memory_bytes=6 * plan.GIB)
    monkeypatch.setitem(plan.DEVICES, "small", small)
    monkeypatch.setitem(plan.ASSUMPTIONS, "engine_awake", (1.0, "for this test"))
    p = plan.plan(asked(model), 2, "small")
    assert p["fits"] == {"loading": True, "training": False, "generation": True, "key-value cache": True}
    keys = [word.rstrip(".") for word in p["remedy"].split() if word.startswith("--")]
    assert keys == [f"--parallel.pack_tokens={p['largest_pack_tokens']['none']}"]
    assert plan.plan(asked(model, *keys), 2, "small")["remedy"] is None
    tight = plan.plan(asked(model, *keys, "--rollout.gpu_memory=0.9"), 2, "small")
    assert "give --rollout.gpu_memory=0." in tight["remedy"] and not tight["fits"]["generation"]


def test_the_command_prints_and_writes_the_same(capsys, model, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)  # nothing was measured
    out = tmp_path / "plan.json"
    args = [
        "--recipe=tiny",
        f"--model={model}",
        "--gpus=16",
        "--device=a100",
        f"--json={out}",
        "--model.dtype=bfloat16",
    ]
    assert plan.main(args) == 0
    said, wrote = capsys.readouterr().out, json.loads(out.read_text())
    assert "It fits." in said and all(kind in said for kind in KINDS)
    assert "Measured: nothing; bench/results has no gpu-a100 files" in said and not wrote["measured"]
    assert all(f"    {name} " in said for name in plan.ASSUMPTIONS)
    assert wrote["remedy"] is None and wrote["gpus"] == 16 and set(wrote["largest_pack_tokens"]) == set(plan.settings())
    assert wrote["training_peak"] in SEGMENTS
    assert sum(wrote["seconds"].values()) == pytest.approx(wrote["step_s"])
    share = wrote["mfu"]["training"]["causal"]
    assert 0 < share < wrote["mfu"]["training"]["torchtitan"] < 1 and wrote["mfu"]["step"]["causal"] < share


def result(folder: Path, name: str, **content: Any) -> Path:
    """A file as bench/gpu.py writes it."""
    (folder / name).write_text(json.dumps({"device": "NVIDIA A100-SXM4-80GB", "date": "2026-11-25"} | content))
    return folder / name


def rows(tensor_parallel: int, **share_at: float) -> list[dict[str, float]]:
    """Iterations of 10 ms by number of sequences (n8=0.5: 8 sequences, half the bandwidth of an A100)."""
    return [{"tensor_parallel": tensor_parallel, "sequences": int(n[1:]), "ms": 10.0,
             "read_bytes": share * 0.01 * plan.DEVICES["a100"].hbm} for n, share in share_at.items()]  # fmt: skip


def test_measured_rates_take_the_place_of_assumptions(tmp_path):
    files = [result(tmp_path, "gpu-a100-3-rows.json", rates={"copy": 0.45}),
             result(tmp_path, "gpu-a100-4-head.json", rates={"gemm": 0.4}, status="cut"),
             result(tmp_path, "gpu-a100-2-iterations.json", iterations=rows(1, n8=0.5, n32=0.3)),
             result(tmp_path, "gpu-a100-1-kernels.json", status="failed")]  # fmt: skip
    m = plan.read_measured(files, "a100")
    assert m.rates["copy"] == (0.45, "measured; gpu-a100-3-rows.json, 2026-11-25") and m.rates["gemm"][0] == 0.4
    assert [round(m.decode_share(1, n), 6) for n in (1, 8, 20, 32, 64)] == [0.5, 0.5, 0.4, 0.3, 0.3]
    assert m.decode_share(4, 8) == plan.ASSUMPTIONS["decode"][0]
    assert len(m.sources) == 3  # the failed part says nothing
    d = plan.DEVICES["a100"]
    before = plan.decode_s([64] * 2, 2, 1e9, 1e5, d)
    with plan.using(m):
        assert plan.assumed("copy") == 0.45 and plan.assumed("attention") == plan.ASSUMPTIONS["attention"][0]
        assert plan.decode_s([64] * 2, 2, 1e9, 1e5, d) == pytest.approx(before * plan.ASSUMPTIONS["decode"][0] / 0.5)
    assert plan.assumed("copy") == plan.ASSUMPTIONS["copy"][0]


def test_the_command_says_what_was_measured_and_what_is_still_assumed(capsys, model, tmp_path, monkeypatch):
    result(tmp_path, "gpu-a100-4-head.json", rates={"gemm": 0.4}, iterations=rows(1, n8=0.5, n64=0.25))
    result(tmp_path, "gpu-h100-4-head.json", device="NVIDIA H100 80GB HBM3", rates={"gemm": 0.9})
    args = ["--recipe=tiny", f"--model={model}", "--gpus=2", "--device=a100", "--model.dtype=bfloat16"]
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    assert plan.main([*args, f"--json={tmp_path / 'plan.json'}"]) == 0
    said, wrote = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    measured, _, still = said.partition("Still assumed:")
    assert "    gemm            0.4     measured; gpu-a100-4-head.json, 2026-11-25" in measured
    assert "decode" in measured and "0.50 at 8, 0.25 at 64" in measured and "NVIDIA A100-SXM4-80GB" in measured
    assert "    attention " in still and "    gemm " not in still and "    decode " not in still
    assert wrote["measured"]["gemm"][0] == 0.4 and "gemm" not in wrote["assumptions"]


@pytest.mark.parametrize("content, says", [
    ("{", "is no result of bench/gpu.py (JSONDecodeError"),
    ('{"device": "NVIDIA H200", "date": "2026-11-25"}', "is of NVIDIA H200, and --device is h100"),
    ('{"device": "NVIDIA H100", "date": "", "rates": {"gemm": -1}}', "holds gemm = -1: give known rates"),
    ('{"device": "NVIDIA H100", "date": "", "rates": {"gem": 1}}', "holds gem = 1"),
    ('{"device": "NVIDIA H100", "date": "", "iterations": [{"sequences": 8}]}', "(KeyError: 'tensor_parallel')"),
])  # fmt: skip
def test_a_file_that_is_no_result_gets_one_sentence(content, says, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError) as e:
        plan.main(["--gpus=8", "--measured", str(tmp_path / "x.json")])
    assert says in str(e.value) and str(e.value).startswith("--measured ") and "\n" not in str(e.value)


MISTAKES = [
    (["--device=b300"], "--device is 'b300', which is not known: give one of h100"),
    (["--gpus=12"], "--gpus is 12: give up to 8, or a multiple of 8"),
    (["--gpus=0"], "--gpus is 0"),
    (["--gpus=many"], "--gpus is 'many': give a number"),
    (["--gpus=24"], "rollout.problems is 32, which 24 ranks cannot share evenly"),
    (["--rollout.engine=vllm", "--rollout.tensor_parallel=3"], "rollout.tensor_parallel is 3, which does not divide 8"),
    (["--model=runs/nowhere"], "The shape of model.path runs/nowhere is not known here: give a folder"),
    (["--json=nowhere/plan.json"], "--json nowhere/plan.json: give a path in a folder that exists"),
    (["--parallel.packtokens=3"], "did you mean parallel.pack_tokens"),
]


@pytest.mark.parametrize("args, says", MISTAKES, ids=[m[0][0] for m in MISTAKES])
def test_a_mistake_gets_one_sentence(monkeypatch, args, says):
    def no_hub(*args: Any, **kwargs: Any) -> None:
        raise OSError("no hub here")

    monkeypatch.setattr(plan.AutoConfig, "from_pretrained", no_hub)
    with pytest.raises(ValueError) as e:
        plan.main(args)
    assert says in str(e.value) and "\n" not in str(e.value)
