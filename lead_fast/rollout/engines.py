"""The engine that `rollout.engine` means on this machine."""

from transformers import PreTrainedTokenizerBase

from ..checks import chosen_engine
from ..config import Config
from ..runtime.ranks import Ranks
from .engine import Engine
from .transformers_engine import TransformersEngine


def make_engine(config: Config, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> Engine:
    """Make the engine that `rollout.engine` means on the ranks' device; vLLM is imported only where it is chosen."""
    if chosen_engine(config, ranks.device.type) == "vllm":
        from .vllm_engine import VllmEngine

        return VllmEngine(config, tokenizer, ranks)
    return TransformersEngine(config, tokenizer, ranks)
