"""Test that the wheel is self-contained: installed into an empty environment, it trains `tiny` from another folder."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from jobs import ROOT, constraints

pytestmark = pytest.mark.slow


def call(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                "--wheel-dir", str(out), str(ROOT), cwd=out)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_both_packages_recipes_and_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in ("lead_fast/train.py", "lead_kernels/__init__.py", "lead_fast/recipes/tiny.toml",
                   "lead_fast/recipes/sft/tiny.toml", "lead_fast/presets/paper.toml",
                   "lead_fast/assets/tiny/model.safetensors", "lead_fast/assets/tiny/tokenizer.json",
                   "lead_fast/assets/tiny/chat_template.jinja"):  # fmt: skip
        assert wanted in names, wanted
    assert not any(n.startswith("kernels/") for n in names)


def test_the_wheel_installs_what_the_checkout_does(wheel, resolve):
    found = resolve(f"{wheel}[gpu,vllm]")  # without the checkout's constraints
    pins = constraints("constraints-cuda.txt")
    for name in ("torch", "triton", "vllm", "flash-attn-4", "liger-kernel"):
        assert found[name] == pins[name]


def test_two_steps_of_tiny_from_another_folder(wheel, tmp_path):
    environment = tmp_path / "environment"
    assert call(sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=tmp_path).returncode == 0
    python = environment / "bin" / "python"
    done = call(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index",
                str(wheel), cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # Dependencies come from this environment: a .pth file adds its folder, without its editable installations.
    site = next((environment / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = call(str(python), "-c", "import lead_fast, lead_kernels; print(lead_fast.__file__, lead_kernels.__file__)",
                 cwd=tmp_path)  # fmt: skip
    assert where.stdout.count(str(site)) == 2, where.stdout + where.stderr
    done = call(str(python), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
                "lead_fast.train", "--steps=2", "--rollout.problems=4", "--rollout.group_size=4",
                "--evaluate.every=0", "--output=run", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "final" / "model.safetensors").exists() and (tmp_path / "run" / "report.html").exists()
