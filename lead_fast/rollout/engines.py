"""The engine that `rollout.engine` means on this machine.

A new engine is a file here with the methods of engine.Engine, a name in RolloutConfig.engine, a branch in `make_engine`
and in `check_engine`, and its room beside the trainer in learner/memory.py. What else asks whether the engine is vLLM:
checks.py (what it can do), machine.py (whether it is installed), evaluate.py (its memory), and the remedies that
sync.py and learner/loss.py name.
"""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..checks import chosen_engine
from ..config import Config
from ..runtime.ranks import Ranks
from .engine import Engine
from .transformers_engine import TransformersEngine, check_generation


def check_engine(shape: PretrainedConfig, c: Config, device_type: str, longest: int) -> None:
    """Refuse a model that the built-in engine would not sample right; vLLM judges for itself what it can serve.

    Args: as `check_generation`; c: rollout.engine and model are used; device_type: "cuda" or "cpu".
    """
    if chosen_engine(c, device_type) == "transformers":
        check_generation(shape, c.model, longest)


def make_engine(config: Config, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> Engine:
    """Make the engine that `rollout.engine` means on the ranks' device; vLLM is imported only where it is chosen."""
    if chosen_engine(config, ranks.device.type) == "vllm":
        from .vllm_engine import VllmEngine

        return VllmEngine(config, tokenizer, ranks)
    return TransformersEngine(config, tokenizer, ranks)
