"""Devices on which the tests of this folder run: 'cpu' always, 'cuda' if torch sees a GPU.

LEAD_TEST_DEVICE=cuda or =cpu selects one of them. A test that needs a GPU takes the fixture `gpu` and is skipped
elsewhere.
"""

import os

import pytest
import torch

from lead_fast.runtime.ranks import Ranks

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ASKED = os.environ.get("LEAD_TEST_DEVICE")
if ASKED:
    DEVICES = [d for d in DEVICES if d == ASKED]


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def gpu() -> torch.device:
    if "cuda" not in DEVICES:
        pytest.skip("only a GPU has this, and torch sees none here")
    return torch.device("cuda")


@pytest.fixture
def ranks(device: torch.device, single_rank: Ranks) -> Ranks:
    """A job of one rank in this process, on the device."""
    if single_rank.device.type != device.type:
        pytest.skip("a job on this machine is on its GPU")
    return single_rank
