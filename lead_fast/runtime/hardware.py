"""Hardware checks before anything is installed or loaded; what prevents a run is reported in one sentence.

    python lead_fast/runtime/hardware.py DIR [--cuda]    before anything is installed in DIR: Python, driver, disk

The top of the file imports only the standard library and uses syntax that an old Python can read, because it runs
before torch is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlparse

PYTHON = (3, 11), (3, 15)  # from the first to below the second: vLLM 0.33's range, within that of torch's wheels
DRIVER = 580  # the first with CUDA 13.0
CAPABILITY = (8, 0)  # Ampere: the first GPUs with bfloat16
INSTALL_GIB = {"cpu": 3, "cuda": 20}  # the environment and pip's temporary files
CPU_RANKS = 2  # ranks that `make train` starts if there is no GPU
GIB = 2**30


# ------------------------------------------------------------------------------------------- before the installation


def nvidia_smi() -> tuple[list[str], str]:
    """Names of the GPUs that the driver reports, and the driver's version; empty if there is none."""
    if not shutil.which("nvidia-smi"):
        return [], ""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return [], ""
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line] if done.returncode == 0 else []
    return [name.strip() for name, _ in rows], rows[0][1].strip() if rows else ""


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> None:
    """Raise ValueError if torch or vLLM has no wheels for this Python."""
    low, high = PYTHON
    if not low <= tuple(version[:2]) < high:
        raise ValueError(
            f"Python is {'.'.join(map(str, version))}, but torch and vLLM have wheels for {low[0]}.{low[1]} to "
            f"{high[0]}.{high[1] - 1}: name another one, as in make install PYTHON=python3.12."
        )


def check_driver(driver: str) -> None:
    """Raise ValueError for an NVIDIA driver that is older than CUDA 13.0."""
    if _older(driver):
        raise ValueError(
            f"The NVIDIA driver is {driver}, but CUDA 13.0 needs {DRIVER} or newer: update the driver, or install for "
            "the CPU with make install CUDA=."
        )


def nearest(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def check_disk(folder: Path, needed: float, purpose: str, remedy: str) -> None:
    """Raise ValueError if the disk that holds, or will hold, `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(nearest(folder)).free
    if free < needed:
        raise ValueError(
            f"{folder} is on a disk with {free / GIB:.1f} GiB free, but {purpose} needs {needed / GIB:.1f} GiB: make "
            f"room, or give {remedy}."
        )


def before_install(folder: Path, cuda: bool) -> str:
    """Check the requirements of an installation, and say what will be installed.

    Args:
        folder: of the virtual environment.
        cuda: install for a GPU. If no driver is visible, as while an image is built, the driver is not checked.
    Raises:
        ValueError: Python, driver or disk does not suffice; one sentence.
    """
    check_python()
    gpus, driver = nvidia_smi() if cuda else ([], "")
    check_driver(driver)
    needed, temporary = INSTALL_GIB["cuda" if cuda else "cpu"] * GIB, Path(tempfile.gettempdir())
    parts = {folder: (needed, "VENV=FOLDER")}
    if nearest(folder).stat().st_dev != nearest(temporary).stat().st_dev:
        parts = {folder: (0.6 * needed, "VENV=FOLDER"), temporary: (0.4 * needed, "TMPDIR=FOLDER")}
    for where, (needed, remedy) in parts.items():
        check_disk(where, needed, "the installation", f"{remedy} on another disk")
    if not cuda:
        return f"Installing for the CPU into {folder}."
    gpu = f"{len(gpus)} x {gpus[0]}, driver {driver}" if gpus else "no driver visible here"
    return f"Installing for CUDA 13.0 into {folder}, about 10 GiB ({gpu})."


# ---------------------------------------------------------------------------------------------------- before a run


def hidden_gpus() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU on purpose."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def use_cuda(local_rank: int, local_ranks: int) -> bool:
    """Whether this rank computes on a GPU; it never falls back to the CPU while the driver reports a GPU.

    Args:
        local_rank, local_ranks: this rank's index among those of this machine, and their number.
    Raises:
        ValueError: torch cannot use the GPUs that the driver reports, there are more ranks than GPUs, a GPU is too old,
            or Triton cannot compile a kernel here.
    """
    import torch

    if not torch.cuda.is_available():
        gpus, driver = ([], "") if hidden_gpus() else nvidia_smi()
        if not gpus:
            return False
        seen = f"nvidia-smi shows {len(gpus)} GPUs (driver {driver}), but torch {torch.__version__} can use none: "
        either = "or set CUDA_VISIBLE_DEVICES= (to nothing) to train on the CPU."
        if not torch.version.cuda:
            raise ValueError(f"{seen}it is a CPU build; run make install, {either}")
        if _older(driver):
            raise ValueError(f"{seen}it needs driver {DRIVER} or newer; update the driver, {either}")
        raise ValueError(f"{seen}python -m torch.utils.collect_env shows why; fix that, {either}")
    n = torch.cuda.device_count()
    if local_ranks > n:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ValueError(
            f"{local_ranks} ranks were started on this machine, but torch sees {n} GPUs"
            f"{f' (CUDA_VISIBLE_DEVICES={seen})' if seen else ''}: give torchrun --nproc_per_node {n}."
        )
    capability = torch.cuda.get_device_capability(local_rank)
    if capability < CAPABILITY:
        raise ValueError(
            f"GPU {local_rank} is {torch.cuda.get_device_name(local_rank)} of compute capability "
            f"{capability[0]}.{capability[1]}, but bfloat16 needs {CAPABILITY[0]}.{CAPABILITY[1]}: choose others with "
            "CUDA_VISIBLE_DEVICES."
        )
    check_compiler()
    return True


def _older(driver: str) -> bool:
    """Whether a driver is older than CUDA 13.0; False if its version is unknown."""
    return driver.split(".")[0].isdigit() and int(driver.split(".")[0]) < DRIVER


def check_compiler() -> None:
    """Raise ValueError if Triton cannot compile its kernel launchers, for which it needs a C compiler and headers."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise ValueError(
            "No C compiler was found, which Triton's kernels need: install one (on Debian and Ubuntu: apt-get install "
            "gcc), or name it in CC."
        )
    header = Path(sysconfig.get_paths(scheme="posix_prefix")["include"]) / "Python.h"
    if not header.is_file():
        raise ValueError(
            f"{header} is missing, which Triton's kernels need: install Python's headers (on Debian and Ubuntu: "
            f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev)."
        )


def ranks_here() -> int:
    """Number of ranks for this machine: one per GPU that torch can use (CUDA_VISIBLE_DEVICES and MIG included), else 2.

    Raises:
        ValueError: as for use_cuda.
    """
    import torch

    return torch.cuda.device_count() if use_cuda(0, 1) else CPU_RANKS


def untested_versions() -> list[str]:
    """Sentences on installed packages outside the range that lead-fast declares and is tested on."""
    from packaging.requirements import Requirement

    out = []
    for requirement in map(Requirement, _declared()):
        version = installed(requirement.name)
        if version and not requirement.specifier.contains(version, prereleases=True):
            out.append(
                f"{requirement.name} {version} is installed, but lead-fast is tested with "
                f'{requirement.name}{requirement.specifier}: pip install "{requirement.name}{requirement.specifier}".'
            )
    return out


def _declared() -> list[str]:
    try:
        return importlib.metadata.requires("lead-fast") or []
    except importlib.metadata.PackageNotFoundError:
        return []  # running from a checkout that was not installed


def installed(name: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def how_to_install(extra: str) -> str:
    """The command that adds an extra to the running environment, to be typed in any folder.

    lead-fast is not on a package index: in a checkout the command names the checkout and its constraints, with a wheel
    the packages themselves, which the wheel pins.
    """
    source = None
    try:
        origin = importlib.metadata.distribution("lead-fast").read_text("direct_url.json")
        url = urlparse(json.loads(origin or "{}").get("url", ""))
        source = Path(unquote(url.path)) if url.scheme == "file" else None
    except importlib.metadata.PackageNotFoundError:
        source = Path(__file__).parents[2]
    pip = f"{sys.executable} -m pip install"
    if source and (source / ".ci" / "constraints-cuda.txt").is_file():
        constraints = source / ".ci" / "constraints-cuda.txt"
        return f'{pip} --no-build-isolation -c "{constraints}" -e "{source}[{extra}]"'
    from packaging.requirements import Requirement

    wanted = []
    for r in map(Requirement, _declared()):
        if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""}):
            r.marker = None
            wanted.append(f'"{r}"')
    return f"{pip} {' '.join(wanted)}"


def require_vllm(device_type: str) -> None:
    """Raise ValueError if vLLM is not installed, with the remedy for this kind of device."""
    if importlib.util.find_spec("vllm"):
        return
    check_python()
    if device_type == "cuda":
        raise ValueError(
            "rollout.engine is vllm (the default on a GPU), which is not installed: "
            f"{how_to_install('vllm')}   or give --rollout.engine=transformers, which is many times slower."
        )
    raise ValueError(
        "rollout.engine is vllm, which is not installed: give --rollout.engine=transformers. (make test-vllm shows "
        "vLLM's CPU build, in a separate environment.)"
    )


def smallest_gpu_gib() -> float:
    """Memory of the smallest GPU that torch sees, in GiB; 0 without a GPU."""
    import torch

    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return min(sizes, default=0) / GIB


if __name__ == "__main__":
    try:
        print(before_install(Path(sys.argv[1]), "--cuda" in sys.argv[2:]))
    except ValueError as e:
        sys.exit("error: " + str(e))
