"""Test the frame of bench/gpu.py on a CPU: parts that crash, hang or lack something, files left on disk, the table."""

import json
import sys
import time
from pathlib import Path

import pytest
from jobs import ROOT, python

sys.path.append(str(ROOT / "bench"))
import gpu  # noqa: E402

WRITES = """
import json, pathlib, sys, time
file, words = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
file.write_text(json.dumps(words))
"""
GOAL = {"goal": "a copy", "aim": 2.0, "measured": 4.0, "unit": "ms", "share": 0.5}
ENDS = {
    "kernels": ({"status": "measured", "goals": [GOAL]}, ""),
    "iterations": ({"status": "skipped", "reason": "vLLM is not installed."}, ""),
    "rows": ({"status": "cut", "goals": [GOAL]}, "raise ValueError('the GPU fell off the bus')"),
    "head": ({"status": "cut", "goals": [GOAL]}, "import subprocess; subprocess.Popen(['sleep', '600'], "
             "start_new_session=True); time.sleep(600)"),
    "step": ({"status": "measured", "goals": []}, ""),
}  # fmt: skip


def test_a_part_that_crashes_or_hangs_costs_only_itself(tmp_path, monkeypatch, capsys):
    def command(part, device, file, limit_s):
        words, then = ENDS[part.name]
        return [sys.executable, "-c", WRITES + then, str(file), json.dumps(words)]

    monkeypatch.setattr(gpu, "command_of", command)
    monkeypatch.setattr(gpu, "PARTS", [gpu.Part(p.number, p.name, 3) for p in gpu.PARTS])
    monkeypatch.setattr(gpu, "CPU_PATIENCE", 1)
    began = time.monotonic()
    assert gpu.main(["--device=cpu", "--parts=4,3,1,2,5", f"--out={tmp_path}"]) == 1
    assert time.monotonic() - began < 60
    found = {p.name.split("-")[2].split(".")[0]: json.loads(p.read_text()) for p in tmp_path.glob("cpu-*.json")}
    assert {name: f["status"] for name, f in found.items()} == {
        "kernels": "measured", "iterations": "skipped", "rows": "failed", "head": "cut", "step": "measured",
    }  # fmt: skip
    assert found["rows"]["reason"] == "ValueError: the GPU fell off the bus" and found["rows"]["goals"] == [GOAL]
    assert "limit of 3 s" in found["head"]["reason"] and found["head"]["goals"] == [GOAL]
    for f in found.values():
        assert {"device", "date", "command", "commit", "versions", "part", "name", "seconds"} <= set(f)
        assert "torch" in f["versions"]
    said = capsys.readouterr().out
    assert "1 a copy" in said and "50%" in said and "2 iterations: skipped, vLLM is not installed." in said
    assert said.index("1 kernels") < said.index("2 iterations") < said.index("3 rows")  # in order of importance
    assert {p.name for p in tmp_path.glob("*.log")} == {"cpu-3-rows.log", "cpu-4-head.log"}
    sleeping = [p for p in Path("/proc").glob("[0-9]*/cmdline") if p.read_bytes() == b"sleep\x00600\x00"]
    assert not [p for p in sleeping if gpu.MARK.encode() in (p.parent / "environ").read_bytes()]


def test_when_the_time_is_over_no_further_part_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "command_of", lambda *_: pytest.fail("a part was begun"))
    assert gpu.main(["--device=cpu", "--limit_s=1", f"--out={tmp_path}"]) == 0
    assert not list(tmp_path.glob("*.json"))


def test_the_whole_time_is_enough_for_all_limits():
    assert sum(p.limit_s for p in gpu.PARTS) <= 600 and [p.number for p in gpu.PARTS] == list(range(1, 8))


@pytest.mark.parametrize("name, key", [
    ("NVIDIA H100 80GB HBM3", "gpu-h100"), ("NVIDIA H200", "gpu-h200"), ("NVIDIA H100 PCIe", "gpu-h100-pcie"),
    ("NVIDIA A100-SXM4-80GB", "gpu-a100"), ("NVIDIA A100-SXM4-40GB", "gpu-a100-40gb"), ("NVIDIA H20", "gpu-h20"),
    ("NVIDIA GH200 480GB", "gpu-gh200"), ("NVIDIA GeForce RTX 4090", "gpu-rtx-4090"), ("Tesla T4", "gpu-tesla-t4"),
])  # fmt: skip
def test_results_are_named_by_the_planners_device(name, key, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda *_: name)
    assert gpu.device_key("cuda") == key


@pytest.mark.parametrize("args, says", [
    (["--parts=1,9"], "--parts is '1,9', and '9' is not a part: give numbers from 1, 2, 3, 4, 5, 6, 7"),
    (["--parts="], "--parts is ''"),
    (["--limit_s=0"], "--limit_s is 0: give seconds above 0"),
    (["--device=cuda"], "torch sees no GPU: give --device cpu"),
])  # fmt: skip
def test_a_mistake_gets_one_sentence(args, says, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError) as e:
        gpu.main(["--device=cpu", *args])
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("parts", ["3,7", pytest.param("1,2,4,5,6", marks=pytest.mark.slow)])
def test_the_way_there_on_a_cpu(parts, tmp_path):
    done = python("bench/gpu.py", "--device=cpu", f"--parts={parts}", f"--out={tmp_path}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    for file in tmp_path.glob("*.json"):
        found = json.loads(file.read_text())
        assert found["status"] == "measured" or "not installed" in found["reason"]
        assert "rates" not in found  # rates of a CPU mean nothing
        if found["status"] == "measured":
            assert found.get("rows") or found.get("goals") or found.get("iterations")
    assert len(list(tmp_path.glob("*.json"))) == len(parts.split(","))
