"""Load weights from safetensors into FSDP's shards, block by block, so that no rank ever holds the unsharded model.

Peak memory per rank while loading: its shards, plus the largest FSDP unit in float32 (embedding, last norm and head, or
one block), plus one tensor of that unit in the file's dtype. The files are memory-mapped, not read into memory.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils.hub import cached_file

from ..config import ModelConfig
from ..runtime.ranks import Ranks
from .model import load_model, load_shape, require_layout, resolve

Fill = Callable[[nn.Module], None]


def open_model(config: ModelConfig, ranks: Ranks, device: torch.device) -> tuple[Any, Fill | None]:
    """Build the model in float32 without weights, with a function that fills a part of it from its files on `device`.

    A model whose files name tensors differently from the model, or which computes buffers of its own, is loaded by
    transformers, unsharded on every rank; nothing is left to fill then, and the first rank says so.

    Raises:
        ValueError: the model cannot be loaded, or lacks a tensor, which transformers would initialise at random.
    """
    path = resolve(config.path)
    shape = load_shape(config)
    try:
        files = {} if getattr(shape, "quantization_config", None) else tensor_files(path)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                shape, dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
    except SafetensorError as e:
        raise ValueError(f"model.path {config.path} cannot be loaded: model.safetensors is damaged ({e}).") from e
    except (OSError, ValueError):
        return load_model(config), None  # its error says what is wrong
    model.tie_weights()
    if lacking := _lacking(model, files):
        raise ValueError(f"model.path {config.path} is incomplete: its files have no tensor {lacking}.")
    if reason := _unlike(model, files):
        if ranks.main and files:
            print(f"Loading {config.path} unsharded on every rank ({reason}).", flush=True)
        return load_model(config), None
    require_layout(model, config)
    if (Path(path) / "generation_config.json").is_file() or not Path(path).is_dir():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except OSError:  # a hub model without a generation config keeps the one that it has
            pass
    return model.eval(), Filler(model, files, device, config.path)


def tensor_files(path: str) -> dict[str, str]:
    """Map the tensor names of a folder or hub model to the safetensors files that hold them; empty if there are none.

    Raises SafetensorError if the only file is damaged.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        if single := cached_file(path, "model.safetensors", **quiet):
            with safe_open(single, "pt") as f:
                return dict.fromkeys(f.keys(), single)
        if index := cached_file(path, "model.safetensors.index.json", **quiet):
            names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            places = {name: str(cached_file(path, name)) for name in set(names.values())}
            return {tensor: places[name] for tensor, name in names.items()}
    except (OSError, ValueError, KeyError):  # transformers will say what is wrong with them
        pass
    return {}


def _aliases(model: nn.Module) -> list[list[str]]:
    """The names of each parameter; a tied parameter has several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return list(names.values())


def _missing(model: nn.Module, files: dict[str, str]) -> str:
    """The first of the model's parameters that the files hold under none of its names, or ""."""
    return next((names[0] for names in _aliases(model) if not any(name in files for name in names)), "")


def _apart(model: nn.Module, files: dict[str, str]) -> list[str]:
    """Names of one parameter under which the files hold different tensors."""
    for names in _aliases(model):
        held = [name for name in names if name in files]
        if not all(torch.equal(_stored(files, held[0]), _stored(files, name)) for name in held[1:]):
            return held
    return []


def _lacking(model: nn.Module, files: dict[str, str]) -> str:
    """A parameter that the files lack although they name their tensors as the model does, or ""."""
    known = {name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    others = [name for name in files if name not in known and not name.endswith("inv_freq")]  # only in older files
    return _missing(model, files) if files and not others else ""


def _unlike(model: nn.Module, files: dict[str, str]) -> str:
    """Why the model cannot be filled from these files tensor by tensor, or "" if it can."""
    if missing := _missing(model, files):
        return f"its files have no tensor {missing}"
    if apart := _apart(model, files):
        return f"its files hold {' and '.join(apart)} separately, but its configuration ties them"
    for where, module in model.named_modules():
        for name in module._buffers:
            stored = f"{where}.{name}".removeprefix(".") in files and name not in module._non_persistent_buffers_set
            if not stored and not _is_rotary(module):
                return f"it computes the buffer {where}.{name}"
    return ""


def _stored(files: dict[str, str], name: str) -> torch.Tensor:
    with safe_open(files[name], "pt") as f:
        return f.get_tensor(name)


def _is_rotary(module: nn.Module) -> bool:
    """Whether transformers' `_init_weights` computes the module's buffers, as it does for rotary embeddings."""
    return "RotaryEmbedding" in type(module).__name__ and hasattr(module, "original_inv_freq")


class Filler:
    """Fill the parameters and buffers of a module that are on the meta device with their values, on `device`.

    Args:
        model: the model that all the modules belong to, not yet sharded.
        files: the result of `tensor_files`.
        source: model.path, for errors.
    """

    def __init__(self, model: Any, files: dict[str, str], device: torch.device, source: str):
        self.model, self.files, self.device, self.source = model, files, device, source
        self.names: dict[int, tuple[nn.Parameter, str]] = {}  # holds the parameter, so that its id is not reused
        for name, p in model.named_parameters(remove_duplicate=False):
            if name in files:
                self.names.setdefault(id(p), (p, name))
        self.paths = {module: name for name, module in model.named_modules()}

    def __call__(self, part: nn.Module) -> None:
        tied: dict[int, nn.Parameter] = {}
        for module in part.modules():
            for name, p in module._parameters.items():
                if p is not None and p.is_meta:
                    if id(p) not in tied:
                        tied[id(p)] = nn.Parameter(self.read(self.names[id(p)][1], p.shape), p.requires_grad)
                    module._parameters[name] = tied[id(p)]
            self._buffers(module)

    def _buffers(self, module: nn.Module) -> None:
        blank = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        if blank and _is_rotary(module):  # on the CPU, like from_pretrained: powers on a GPU round differently
            module._buffers.update({name: torch.empty_like(b, device="cpu") for name, b in blank.items()})
            self.model._init_weights(module)
            module._apply(lambda t: t.to(self.device))
        else:
            for name, b in blank.items():
                module._buffers[name] = self.read(f"{self.paths[module]}.{name}", b.shape, b.dtype)

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Read one tensor in `dtype` into new memory. Raises ValueError if the file does not hold it in that shape."""
        try:
            with safe_open(self.files[name], "pt") as f:
                stored = f.get_tensor(name)
        except (OSError, SafetensorError) as e:
            raise ValueError(f"model.path {self.source} cannot be loaded: {self.files[name]}: {e}") from e
        if stored.shape != shape:
            raise ValueError(
                f"model.path {self.source} cannot be loaded: {name} has shape {[*stored.shape]} in its files and "
                f"{[*shape]} according to its config.json."
            )
        out = torch.empty(shape, dtype=dtype, device=self.device)
        return out.copy_(stored.to(self.device))
