"""Distributed checkpoints that are whole or not there, and the final model in Hugging Face layout.

A checkpoint is written to `<run>/checkpoints/step-N.partial`, renamed to `step-N` when every rank is done, and only
then named in `latest`. All random draws are functions of (seed, step, rank) and the data position is the step, so the
step number is the random state.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from transformers import PreTrainedTokenizerBase

from .distributed import Ranks
from .model import Policy

KEEP = 2


def save(run: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, extra: dict, ranks: Ranks) -> None:
    """Model, optimiser and `extra` (JSON) after `step` steps. A collective."""
    folder = run / "checkpoints" / f"step-{step}"
    partial = folder.with_suffix(".partial")
    if ranks.main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    model, optim = get_state_dict(policy, optimizer)
    dcp_save({"model": model, "optim": optim}, checkpoint_id=partial)
    if ranks.main:
        (partial / "extra.json").write_text(json.dumps({"step": step, **extra}))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        write_atomic(run / "checkpoints" / "latest", folder.name)
        for old in sorted(whole(run), key=number)[:-KEEP]:
            shutil.rmtree(old)
    ranks.barrier()


def whole(run: Path) -> list[Path]:
    """Checkpoint folders that were finished."""
    folders = (run / "checkpoints").glob("step-*")
    return [
        p for p in folders if p.suffix != ".partial" and (p / "extra.json").is_file() and (p / ".metadata").is_file()
    ]


def number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def load(run: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Read the newest whole checkpoint into model and optimiser, on any number of ranks. A collective.

    Returns:
        what was saved as `extra`, with `step`; None if there is no checkpoint.
    """
    found = sorted(whole(run), key=number)
    if not found:
        return None
    model, optim = get_state_dict(policy, optimizer)
    state = {"model": model, "optim": optim}
    dcp_load(state, checkpoint_id=found[-1])
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return json.loads((found[-1] / "extra.json").read_text())


def export(folder: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, ranks: Ranks) -> None:
    """The model in Hugging Face layout, safetensors in `dtype`, with its tokenizer. A collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(policy, options=options)
    if ranks.main:
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        weights = {k.removeprefix("model."): v.to(dtype) for k, v in state.items() if isinstance(v, torch.Tensor)}
        if policy.model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        policy.model.save_pretrained(partial, state_dict=weights)
        config = json.loads((partial / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")  # of the file, not of the masters
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    ranks.barrier()


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the new one, never half."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)
