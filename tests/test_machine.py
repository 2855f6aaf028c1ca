"""Test set-up for GPU machines without a GPU: commands install, and anything missing gets one sentence."""

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from base64 import urlsafe_b64encode
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jobs import ROOT, commands, constraints
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lead_fast import command, machine, train
from lead_fast.checks import check, chosen_engine
from lead_fast.cli import load_config
from lead_fast.evaluate import main as evaluate_main
from lead_fast.learner import attention
from lead_fast.learner.attention import Attention
from lead_fast.runtime import hardware

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
H100 = "NVIDIA H100 80GB HBM3"


# ------------------------------------------------------------------------------------------------------ the Makefile


def stub_nvidia_smi(folder: Path, listing: str, driver: str = "580.95.05", code: int = 0) -> dict[str, str]:
    """Make an environment whose nvidia-smi -L prints these lines."""
    names = [re.sub(r"GPU \d+: (.*?) \(UUID.*", r"\1", line) for line in listing.splitlines() if line.startswith("GPU")]
    query = "".join(f"{name}, {driver}\n" for name in names)
    (folder / "listing").write_text(listing)
    (folder / "query").write_text(query)
    script = folder / "nvidia-smi"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in -L) cat {folder}/listing;; --query*) cat {folder}/query;; esac\nexit {code}\n'
    )
    script.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def eight_h100(folder: Path, driver: str = "580.95.05") -> dict[str, str]:
    return stub_nvidia_smi(folder, "".join(f"GPU {i}: {H100} (UUID: GPU-{i})\n" for i in range(8)), driver)


def planned(target: str, env: dict[str, str], *args: str) -> str:
    """Return what make would run for a target."""
    env = {k: v for k, v in env.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # set if make runs the tests
    command = ["make", "--no-print-directory", "-n", target, *args]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target", ["install", "train", "test", "gpu"])
def test_where_a_gpu_is_make_installs_the_cuda_set_with_vllm(target, tmp_path):
    text = planned(target, eight_h100(tmp_path), f"VENV={tmp_path}/env")
    (extras,) = re.findall(r'--editable "\.\[(.*?)\]"', text)
    assert extras.split(",") == ["gpu", "vllm", "dev"]
    assert "torch==2.14.0" in text and "-c .ci/constraints-cuda.txt" in text
    installs = [line for line in text.splitlines() if "pip install" in line and "--upgrade" not in line]
    assert len(installs) == 2 and all("--only-binary :all:" in line for line in installs)
    assert "lead_fast/runtime/hardware.py" in text.splitlines()[0] and "--cuda" in text.splitlines()[0]


def test_without_a_gpu_make_installs_the_cpu_set(tmp_path):
    for listing, code in (("", 9), ("No devices were found\n", 0)):  # a driver that does not answer, a login node
        text = planned("install", stub_nvidia_smi(tmp_path, listing, code=code), f"VENV={tmp_path}/env")
        assert "torch==2.13.0" in text and '".[dev]"' in text and ".ci/constraints.txt" in text
        assert "constraints-cuda" not in text and "--cuda" not in text
    text = planned("install", eight_h100(tmp_path), f"VENV={tmp_path}/env", "CUDA=")  # requested explicitly
    assert "torch==2.13.0" in text


def test_an_environment_with_the_cuda_set_keeps_it_on_a_login_node(tmp_path):
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / ".installed-cuda").touch()
    text = planned("test", stub_nvidia_smi(tmp_path, "", code=9), f"VENV={tmp_path}/env")
    assert "torch==2.13.0" not in text and "pytest" in text


def test_ranks_come_from_torch_unless_they_are_given(tmp_path):
    env = eight_h100(tmp_path)
    last = planned("train", env, f"VENV={tmp_path}/env").splitlines()[-1]
    assert "lead_fast.machine --ranks" in last and "--nproc_per_node $ranks -m lead_fast.train" in last
    last = planned("train", env, f"VENV={tmp_path}/env", "RANKS=4", "ARGS=--steps=3").splitlines()[-1]
    assert last.startswith("ranks=4 &&") and last.endswith("-m lead_fast.train --steps=3")


def test_on_a_gpu_machine_the_cpu_tests_see_no_gpu(tmp_path):
    env = eight_h100(tmp_path)
    for target in ("test-quick", "test", "test-slow"):
        assert planned(target, env, f"VENV={tmp_path}/env").splitlines()[-1].startswith("CUDA_VISIBLE_DEVICES= ")
    assert not planned("gpu", env, f"VENV={tmp_path}/env").splitlines()[-1].startswith("CUDA_VISIBLE_DEVICES")


def test_every_extra_and_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.M))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)
    assert set(phony.split()) == targets
    assert set(makefile.splitlines()[0].removeprefix("# make ").split(" | ")) <= targets
    texts = {p: p.read_text() for p in (ROOT / "docs").rglob("*.md")} | {
        ROOT / "README.md": (ROOT / "README.md").read_text()
    }
    named = re.findall(r"^EXTRAS_\w+ := (.*)$", makefile, re.M)
    for text in [makefile, *texts.values()]:
        named += re.findall(r'\.\[([a-z,]+)\]"', text) + re.findall(r"\.whl\[([a-z,]+)\]", text)
        assert "lead-fast[" not in text, "no index has lead-fast: name the checkout's path or the wheel's"
    assert named and {e for group in named for e in group.split(",")} <= set(EXTRAS)
    for path in sorted((ROOT / "lead_fast").glob("*.py")):
        assert "lead-fast[" not in path.read_text(), path.name
    for word in re.findall(r"RUN make ([a-z0-9-]+)", (ROOT / "docs" / "launch" / "Dockerfile").read_text()):
        assert word in targets


# -------------------------------------------------------------------------------------------------------- the sets


@pytest.mark.parametrize("name, tested", [("constraints.txt", {"torch": "2.13.0"}), ("constraints-cuda.txt", {})])
def test_the_sets_lie_within_what_the_project_declares(name, tested):
    pins = constraints(name) | tested
    extras = ("gpu", "vllm", "dev") if "cuda" in name else ("dev",)
    for requirement in map(Requirement, [*PROJECT["dependencies"], *(r for e in extras for r in EXTRAS[e])]):
        version = pins[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} and {version}"


def test_the_lower_ends_are_what_test_oldest_installs():
    (oldest,) = re.findall(r"^OLDEST := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    pins = dict(p.split("==") for p in oldest.split())
    for requirement in map(Requirement, PROJECT["dependencies"]):
        if requirement.name in pins:
            (low,) = [s.version for s in requirement.specifier if s.operator == ">="]
            assert Version(low) == Version(pins.pop(requirement.name)), requirement.name
    assert not pins
    low, high = hardware.PYTHON
    assert PROJECT["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="the CUDA set is for Linux")
def test_the_cuda_set_resolves_from_wheels_alone(resolve):
    pins = constraints("constraints-cuda.txt")
    found = resolve("-c", ".ci/constraints-cuda.txt", "--editable", ".[gpu,vllm,dev]")
    assert found.pop("lead-fast") == PROJECT["version"]
    missing = {name: version for name, version in found.items() if pins.get(name) != version and name != "setuptools"}
    assert not missing, f"not in the constraints: {missing}"
    for name in ("torch", "vllm", "flash-attn-4", "liger-kernel", "triton"):
        assert name in found
    assert found["torch"] == re.findall(r"^TORCH_cuda := torch==(.*)$", (ROOT / "Makefile").read_text(), re.M)[0]


# ------------------------------------------------------------------------------------------- before an installation


@pytest.mark.parametrize("version", [(3, 10, 4), (3, 15, 0)])
def test_a_python_outside_the_range_gets_a_sentence(version):
    with pytest.raises(ValueError, match=rf"Python is {'.'.join(map(str, version))}, .* 3.11 to 3.14: .*PYTHON="):
        hardware.check_python(version)
    hardware.check_python((3, 14, 2))


def test_an_installation_is_checked_before_it_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: SimpleNamespace(free=21 * hardware.GIB))
    monkeypatch.setenv("PATH", eight_h100(tmp_path)["PATH"])
    assert f"8 x {H100}, driver 580.95.05" in hardware.before_install(tmp_path / "env", cuda=True)
    monkeypatch.setenv("PATH", eight_h100(tmp_path, driver="550.54.14")["PATH"])
    with pytest.raises(ValueError, match="The NVIDIA driver is 550.54.14, but CUDA 13.0 needs 580 or newer"):
        hardware.before_install(tmp_path / "env", cuda=True)


def test_the_check_of_an_installation_ends_with_one_sentence(tmp_path):
    command = [sys.executable, str(ROOT / "lead_fast" / "runtime" / "hardware.py"), str(tmp_path / "env"), "--cuda"]
    env = eight_h100(tmp_path, driver="550.54.14")
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: The NVIDIA driver is 550.54.14")
    assert done.stderr.count("\n") == 1


def test_too_little_disk_gets_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * hardware.GIB))
    with pytest.raises(ValueError, match=r"env is on a disk with 2.0 GiB free, but the installation needs 20.0 GiB"):
        hardware.before_install(tmp_path / "env", cuda=True)
    with pytest.raises(ValueError, match=r"needs 3.0 GiB: make room, or give VENV=FOLDER on another disk"):
        hardware.before_install(tmp_path / "env", cuda=False)


def test_a_run_whose_checkpoints_do_not_fit_the_disk_gets_a_sentence(tmp_path, monkeypatch, capsys):
    from lead_fast.learner.checkpoint import check_room
    from lead_fast.planner.shapes import QWEN_14B, AutoConfig

    shape = AutoConfig.for_model(**QWEN_14B)
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * hardware.GIB))
    with pytest.raises(ValueError, match=r"100.0 GiB free, but writing a checkpoint of 165.1 GiB .* needs 192.6 GiB"):
        check_room(tmp_path, shape, checkpoint_every=20)
    check_room(tmp_path, shape, checkpoint_every=0)  # 27.5 GiB of exported weights
    assert not capsys.readouterr().out
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: SimpleNamespace(free=300 * hardware.GIB))
    check_room(tmp_path, shape, checkpoint_every=20)
    assert "3 checkpoints of 165.1 GiB and the model there needs 522.7 GiB" in capsys.readouterr().out
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * hardware.GIB))
    (tmp_path / "checkpoints" / "step-20").mkdir(parents=True)
    with open(tmp_path / "checkpoints" / "step-20" / "weights", "wb") as f:
        f.truncate(int(430 * hardware.GIB))  # a resumed run: existing files need not be written again
    check_room(tmp_path, shape, checkpoint_every=20)
    assert not capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ before a run


def pretend_gpus(monkeypatch, n: int, gib: float = 79.1, capability=(9, 0)) -> None:
    """Make torch report n GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: H100)
    properties = SimpleNamespace(name=H100, total_memory=int(gib * hardware.GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i=0: properties)


def test_gpus_that_torch_cannot_use_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for driver, cuda, says in (("550.54.14", "13.0", "it needs driver 580 or newer; update the driver"),
                               ("580.95.05", "13.0", "collect_env shows why; fix that"),
                               ("580.95.05", None, "it is a CPU build; run make install")):  # fmt: skip
        monkeypatch.setenv("PATH", eight_h100(tmp_path, driver)["PATH"])
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with pytest.raises(ValueError) as e:
            hardware.use_cuda(0, 8)
        assert f"nvidia-smi shows 8 GPUs (driver {driver}), but torch" in str(e.value) and says in str(e.value)
        assert "or set CUDA_VISIBLE_DEVICES=" in str(e.value) and "\n" not in str(e.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on purpose
    assert hardware.use_cuda(0, 8) is False


def test_every_command_ends_with_that_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run = f"--output={tmp_path}/run"
    lines = [["lead_fast.train", run], ["lead_fast.sft", run], ["lead_fast.evaluate", run], ["lead_fast.machine"]]
    for line, (code, _) in zip(lines, commands(*lines, PATH=eight_h100(tmp_path)["PATH"]), strict=True):
        assert str(code).startswith("error: nvidia-smi shows 8 GPUs") and "\n" not in code, line
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_gpus_and_old_gpus_get_a_sentence(monkeypatch):
    pretend_gpus(monkeypatch, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert hardware.use_cuda(3, 4) is True and hardware.ranks_here() == 4
    with pytest.raises(ValueError, match=r"8 ranks .* sees 4 GPUs \(CUDA_VISIBLE_DEVICES=0,1,2,3\): .*node 4\."):
        hardware.use_cuda(0, 8)
    pretend_gpus(monkeypatch, 1, capability=(7, 0))
    with pytest.raises(ValueError, match="compute capability 7.0, but bfloat16 needs 8.0"):
        hardware.use_cuda(0, 1)


def test_what_triton_compiles_with_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    hardware.check_compiler()
    monkeypatch.setattr(hardware.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    with pytest.raises(ValueError, match=r"Python.h is missing.*apt-get install python3.\d+-dev"):
        hardware.check_compiler()
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="No C compiler was found"):
        hardware.check_compiler()


@pytest.mark.parametrize(
    "gpus, gib, world, here, recipe, says",
    [
        (8, 79.1, 8, 8, "lead-14b", "8 GPUs with 79 GiB each"),
        (8, 79.0, 8, 8, "lead-14b", ""),  # an '80 GB' card reports less than 79.1
        (8, 139.7, 8, 8, "lead-14b", ""),
        (4, 139.7, 8, 4, "lead-14b", ""),  # two machines
        (8, 39.4, 8, 8, "tiny", "Warning: 8 GPUs with 39 GiB each, of which 8 train the small embedded model"),
        (8, 79.1, 1, 1, "tiny", "of which 1 train the small embedded model, and lead-14b needs 8 ranks"),
        (0, 0, 2, 2, "tiny", "no GPU, and lead-14b needs"),
    ],
)
def test_the_recipe_fits_the_ranks(monkeypatch, gpus, gib, world, here, recipe, says):
    pretend_gpus(monkeypatch, gpus, gib)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    name, why = machine.pick_recipe()
    assert name == recipe and says in why


ASKED = ["--recipe=lead-14b"]


@pytest.mark.parametrize(
    "args, ranks, here, device, tensor_parallel, batch_size",
    [
        (ASKED, 8, 8, "cuda", 4, 128),
        (ASKED, 16, 8, "cuda", 4, 64),  # 4 engines get 64 responses each, within the recipe's cap
        (ASKED, 6, 6, "cuda", 2, 88),  # 11 problems for the engine that gets most
        (ASKED, 8, 1, "cuda", 1, 64),  # one GPU per machine: an engine does not span machines
        (ASKED, 4, 4, "cuda", 4, 256),
        (["--recipe=lead-14b-stage2"], 8, 8, "cuda", 4, 128),
        (["--recipe=lead-14b-official"], 8, 8, "cuda", 4, 128),
        (["--recipe=lead-7b"], 8, 8, "cuda", 1, 64),
        (["--recipe=lead-7b"], 2, 2, "cuda", 1, 128),
        ([*ASKED, "--rollout.tensor_parallel=2"], 8, 8, "cuda", 2, 64),
        ([*ASKED, "--rollout.tensor-parallel", "1"], 8, 8, "cuda", 1, 64),
        ([*ASKED, "--rollout.batch_size=32"], 8, 8, "cuda", 4, 32),
        ([*ASKED, "--rollout.batch_size=0"], 8, 8, "cuda", 4, 0),  # all of an engine's responses, whatever their number
        ([*ASKED, "--rollout.extra_problems=32"], 8, 8, "cuda", 4, 256),
        ([*ASKED, "--rollout.engine=transformers"], 8, 8, "cuda", 1, 64),
        (ASKED, 8, 8, "cpu", 1, 64),
        (["--recipe=tiny"], 8, 8, "cuda", 1, 128),
    ],
)
def test_lead_14b_fits_its_engines_to_the_machine(args, ranks, here, device, tensor_parallel, batch_size):
    c = load_config(args)
    fitted, reasons = machine.fit_engine(c, args, ranks, here, device)
    assert (fitted.rollout.tensor_parallel, fitted.rollout.batch_size) == (tensor_parallel, batch_size)
    said = " ".join(reasons)
    changed = fitted.rollout.tensor_parallel != c.rollout.tensor_parallel
    assert (f"tensor parallel {tensor_parallel} because" in said) == changed
    assert (f"batch size {batch_size} because" in said) == (batch_size != c.rollout.batch_size)
    if c.rollout.problems % ranks == 0:
        check(fitted, ranks, device_type=device)


def test_a_file_of_the_users_own_is_left_as_it_is(tmp_path):
    (tmp_path / "lead-14b.toml").write_text("[rollout]\ntensor_parallel = 2\n")
    args = [f"--config={tmp_path / 'lead-14b.toml'}"]
    c = load_config(args)
    assert machine.fit_engine(c, args, 8, 8, "cuda") == (c, [])


def test_the_first_lines_of_lead_14b_say_what_was_fitted_and_why(monkeypatch, capsys):
    pretend_gpus(monkeypatch, 8)
    ranks = SimpleNamespace(world=8, main=True, device=torch.device("cuda", 0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(train, "start", lambda parallel: ranks)
    monkeypatch.setattr(command, "stop", lambda: None)
    monkeypatch.setattr(train, "look_at_machine", lambda *a, **k: None)
    train.main(["--recipe=lead-14b", "--dry-run"])
    out = capsys.readouterr().out
    assert "Recipe lead-14b: tensor parallel 4 because an engine reads all 14 billion weights" in out
    assert "Recipe lead-14b: batch size 128 because each of 2 engines gets 128 responses per step." in out
    assert "\ntensor_parallel = 4\n" in out and "\nbatch_size = 128\n" in out


def test_auto_means_vllm_on_a_gpu_and_does_not_fall_back(monkeypatch):
    c = load_config(["--recipe=lead-14b"])
    assert chosen_engine(c, "cuda") == "vllm" and chosen_engine(c, "cpu") == "transformers"
    named = load_config(["--recipe=lead-14b", "--rollout.engine=transformers"])
    assert chosen_engine(named, "cuda") == "transformers"
    shared = load_config(["--recipe=lead-14b", "--rollout.tensor_parallel=4"])
    check(shared, 8, device_type="cuda")
    with pytest.raises(ValueError, match="only vLLM supports"):
        check(shared, 8)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: .*pip install.*or give --rollout.engine=transformers"):
        hardware.require_vllm("cuda")
    with pytest.raises(ValueError, match="not installed: give --rollout.engine=transformers"):
        hardware.require_vllm("cpu")


def test_remedies_work_as_typed(monkeypatch, tmp_path):
    def distribution(direct_url):
        text = json.dumps({"url": direct_url}) if direct_url else None
        found = SimpleNamespace(read_text=lambda name: text, metadata={})
        monkeypatch.setattr(hardware.importlib.metadata, "distribution", lambda name: found)

    distribution(ROOT.as_uri())  # an editable installation, from any folder
    command = hardware.how_to_install("vllm")
    assert f'-e "{ROOT}[vllm]"' in command and f'-c "{ROOT}/.ci/constraints-cuda.txt"' in command
    assert command.startswith(sys.executable)
    distribution((tmp_path / "lead_fast-0.1.0-py3-none-any.whl").as_uri())
    declared = [f'{r}; extra == "{e}"' for e, rs in EXTRAS.items() for r in rs] + PROJECT["dependencies"]
    monkeypatch.setattr(hardware, "_declared", lambda: declared)
    assert hardware.how_to_install("vllm").endswith(f'pip install "{EXTRAS["vllm"][0]}"')
    distribution(None)
    command = hardware.how_to_install("gpu").removeprefix(sys.executable)
    assert command == " -m pip install " + " ".join(f'"{Requirement(r)}"' for r in EXTRAS["gpu"])


def test_versions_outside_the_declared_range_are_named(monkeypatch):
    monkeypatch.setattr(hardware, "_declared", lambda: PROJECT["dependencies"])
    real = hardware.installed
    monkeypatch.setattr(hardware, "installed", lambda name: "2.10.0" if name == "torch" else real(name))
    (sentence,) = [s for s in hardware.untested_versions() if s.startswith("torch ")]
    assert sentence.startswith("torch 2.10.0 is installed, but lead-fast is tested with torch<2.15,>=2.11")
    monkeypatch.setattr(hardware, "installed", lambda name: "2.13.0+cpu" if name == "torch" else real(name))
    assert not [s for s in hardware.untested_versions() if s.startswith("torch ")]


def test_the_first_lines_of_eight_gpus(monkeypatch, tmp_path):
    pretend_gpus(monkeypatch, 8)
    monkeypatch.setenv("PATH", eight_h100(tmp_path)["PATH"])
    monkeypatch.setattr(machine, "installed", lambda name: {"vllm": "0.33.0"}.get(name))
    lines = machine.describe(torch.device("cuda", 0), 8, "bfloat16", 128, False, "vllm").splitlines()
    assert lines[0] == f"Device: 8 x {H100} (79 GiB), driver 580.95.05, torch {torch.__version__}."
    assert lines[1] == "Rollouts: vLLM 0.33.0." and lines[2].startswith("Attention: torch's varlen_attn")
    assert re.match(r"Kernels: Triton \d", lines[3]) and lines[4].endswith("torch (model.liger is false).")


def test_an_evaluation_has_the_gpu_to_itself(monkeypatch):
    seen = []
    monkeypatch.setattr("lead_fast.evaluate.check", lambda c, *a, **k: seen.append(c.rollout.gpu_memory) or 1 / 0)
    monkeypatch.setattr("lead_fast.evaluate.start", lambda: SimpleNamespace(world=1, device=torch.device("cpu")))
    for args, share in ((["--recipe=tiny"], 0.9), (["--recipe=tiny", "--evaluate.gpu_memory=0.5"], 0.5)):
        with pytest.raises(ZeroDivisionError):
            evaluate_main(args)
        assert seen.pop() == share
    with pytest.raises(ValueError, match="evaluate.gpu_memory is 1.5"):
        check(load_config(["--evaluate.gpu_memory=1.5"]), 2)


def test_the_allocator_is_set_before_torch_is_there():
    for given, expected in ((None, "expandable_segments:True"), ("max_split_size_mb:64", None)):
        env = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")}
        env |= {"PYTORCH_CUDA_ALLOC_CONF": given} if given else {}
        code = "import sys, os, lead_fast; print(os.environ.get('PYTORCH_ALLOC_CONF'), 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.stdout.strip() == f"{expected} False"


# --------------------------------------------------------------------------------------------------------- attention


def install_package(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """Write a distribution as pip would: files, METADATA and RECORD."""
    record = []
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
        digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(text)}")
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("\n".join([*record, f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]) + "\n")


FA2 = """
__version__ = "2.8.3"
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):
    assert causal and max_seqlen_q == max_seqlen_k and cu_seqlens_q is cu_seqlens_k
    return q * softmax_scale
"""
FA4 = "def _flash_attn_fwd(q): pass\ndef _flash_attn_bwd(q): pass\n"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An empty folder of packages that precedes all others; flash-attn installed elsewhere is hidden."""
    installed_before = attention.fa4_version()
    if installed_before or importlib.util.find_spec("flash_attn"):
        pytest.skip("a flash-attn is installed here")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    attention.choose.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


def test_nothing_of_flash_attn_is_required(packages):
    assert attention.choose((9, 0), 128) == Attention("torch's varlen_attn")


def test_an_old_flash_attn_with_a_cute_folder_is_fa2(packages):
    install_package(packages, "flash-attn", "2.8.3", {"flash_attn/__init__.py": FA2, "flash_attn/cute/__init__.py": "",
                                                      "flash_attn/cute/interface.py": FA4})  # fmt: skip
    assert attention.fa4_version() is None
    chosen = attention.choose((9, 0), 128)
    assert chosen.name == "flash-attn, FA2 (2.8.3)" and chosen.fa2
    q, cu = torch.ones(5, 4, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    assert (attention.varlen_attention(q, q, q, cu, 3, 0.5, chosen) == 0.5).all()


def test_fa4_is_known_by_its_distribution_and_its_files(packages, monkeypatch):
    install_package(packages, "flash-attn-4", "4.0.0b36", {"flash_attn/cute/__init__.py": "",
                                                           "flash_attn/cute/interface.py": FA4})  # fmt: skip
    assert attention.fa4_version() == "4.0.0b36"
    activated = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(torch, "__version__", "2.14.0+cu130")
    assert attention.choose((9, 0), 128).name == "torch's varlen_attn by FA4 (flash-attn-4 4.0.0b36)"
    assert activated == ["FA4"]
    for capability, head_dim in (((8, 0), 128), ((12, 0), 128), ((9, 0), 512), ((10, 0), 192), ((9, 0), 100)):
        unfit = f"not for compute capability {capability[0]}.{capability[1]} with a head dim of {head_dim}"
        said = f"torch's varlen_attn; FA4 is installed and cannot be used ({unfit})"
        assert attention.choose(capability, head_dim) == Attention(said)
    assert activated == ["FA4"]
    attention.choose.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")  # it unpacks two of the five values that FA4 returns
    said = "torch's varlen_attn; FA4 is installed and cannot be used (it needs torch 2.14)"
    assert attention.choose((9, 0), 128) == Attention(said)
    (packages / "flash_attn" / "cute" / "interface.py").write_text("# of the old archive, installed over it\n")
    assert attention.fa4_version() is None
    attention.choose.cache_clear()
    chosen = attention.choose((9, 0), 128)
    assert "cannot be used (another package has overwritten its files" in chosen.name and chosen.fa2 is None
    assert activated == ["FA4"]


def test_an_implementation_that_cannot_be_activated_is_named_with_the_reason(packages, monkeypatch):
    install_package(packages, "flash-attn-4", "4.0.0b36", {"flash_attn/cute/interface.py": FA4})

    def broken(name):
        raise ImportError("cutlass-dsl is too old")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", broken)
    monkeypatch.setattr(torch, "__version__", "2.14.0+cu130")
    chosen = attention.choose((9, 0), 128)
    assert chosen.fa2 is None
    assert chosen.name.endswith("FA4 is installed and cannot be used (ImportError: cutlass-dsl is too old)")


@pytest.mark.skipif(
    attention.fa4_version() is None, reason="flash-attn-4 is not installed: make check-cuda installs it"
)
def test_the_real_flash_attn_4_is_activated_behind_torchs_attention_operator():
    chosen = attention.choose((9, 0), 128)
    assert chosen == Attention(f"torch's varlen_attn by FA4 (flash-attn-4 {attention.fa4_version()})")
    assert torch.nn.attention.current_flash_attention_impl() == "FA4"
    source = inspect.getsource(importlib.import_module("torch.nn.attention._fa4"))
    assert "out, lse, *_ = module._flash_attn_fwd" in source, "FA4_TORCH rests on this line of torch's"


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((str(func), args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grouped", [True, False])
def test_packed_attention_on_cuda_is_torchs_operator_with_shared_heads(grouped, monkeypatch):
    monkeypatch.setattr(attention, "varlen_takes_gqa", lambda: grouped and attention_takes_gqa())
    with FakeTensorMode(), Calls() as calls:
        q = torch.empty(300, 40, 128, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(300, 8, 128, dtype=torch.bfloat16, device="cuda")
        cu = torch.empty(4, dtype=torch.int32, device="cuda")
        out = attention.varlen_attention(q, k, k, cu, 120, 128**-0.5, Attention("torch's varlen_attn"))
        assert out.shape == q.shape and out.dtype == q.dtype
    (call,) = [(args, kw) for name, args, kw in calls.seen if "_varlen_attn" in name]
    schema = [a.name for a in torch.ops.torch_attn._varlen_attn.default._schema.arguments]
    given = dict(zip(schema, call[0], strict=False)) | call[1]
    assert given["max_q"] == given["max_k"] == 120 and given["scale"] == 128**-0.5
    assert list(given["window_size"]) == [-1, 0] and given["is_causal"]
    assert given["key"].shape[1] == (8 if grouped and attention_takes_gqa() else 40)


def attention_takes_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def test_vllm_of_the_cuda_set_takes_this_python_and_torch():
    if hardware.installed("vllm") is None:
        pytest.skip("vLLM's CUDA build is not installed: make check-cuda installs it")
    metadata = importlib.metadata.metadata("vllm")
    low, high = hardware.PYTHON
    given = SpecifierSet(metadata["Requires-Python"])
    assert given.contains(f"{low[0]}.{low[1]}.0") and not given.contains(f"{high[0]}.{high[1]}.0")
    assert given.contains(f"{high[0]}.{high[1] - 1}.9")
    constraints_of = {r.name: r.specifier for r in map(Requirement, importlib.metadata.requires("vllm") or [])}
    assert constraints_of["torch"].contains(constraints("constraints-cuda.txt")["torch"])
