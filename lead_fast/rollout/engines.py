"""Selection of the engine that `rollout.engine` names on this machine.

To add an engine, write a file here with the methods of engine.Engine, and add a name in RolloutConfig.engine, a branch
in `make_engine` and in `check_engine`, and its memory beside the trainer in learner/memory.py. Other code that asks
whether the engine is vLLM: checks.py (what it supports), machine.py (whether it is installed), evaluate.py (its
memory), and the remedies that sync.py and learner/loss.py name.
"""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..checks import chosen_engine
from ..config import Config
from ..runtime.ranks import Ranks
from .engine import Engine
from .transformers_engine import TransformersEngine, check_generation


def check_engine(shape: PretrainedConfig, c: Config, device_type: str, longest: int) -> None:
    """Refuse a model that the built-in engine would sample incorrectly; vLLM decides itself what it can serve.

    Args: as for `check_generation`; c: uses rollout.engine and model; device_type: "cuda" or "cpu".
    """
    if chosen_engine(c, device_type) == "transformers":
        check_generation(shape, c.model, longest)


def make_engine(config: Config, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> Engine:
    """Make the engine that `rollout.engine` names for the ranks' device; vLLM is imported only if it is chosen."""
    if chosen_engine(config, ranks.device.type) == "vllm":
        from .vllm_engine import VllmEngine

        return VllmEngine(config, tokenizer, ranks)
    return TransformersEngine(config, tokenizer, ranks)
