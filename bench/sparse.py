"""Compare the sparse backward with the dense one in time and error, on SmolLM2-135M's own responses, on a CPU.

    python bench/sparse.py [--model DIR_OR_HUB_NAME] [--rows 1024] [--runs DIR] [--out FILE]

The model answers word problems at temperature 0.5 and 1. Its hidden states, its head (V 49,152) and the tokens that it
sampled are the input, cached under --runs. For each temperature and dtype it times in turns one bare product (hidden
states times head), and `linear_policy_loss` with both gradients and with a frozen head, dense and for several values of
`dropped_mass`. It prints a table: time in ms and in bare products, share of the columns that were multiplied, mass that
was dropped, error of d(hidden) against float64 from the same hidden states and head, and the bound on it. The goal at
temperature 0.5: at most 1.6 bare products with a frozen head, 2.4 with a dense d(head), and an error of at most 2e-3.
On two CPU cores it takes minutes, for which --temperature and --dtype choose one case.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import RESULTS, interleaved, machine, summary, write_json
from pipeline import pretrained

from lead_kernels import LossOptions, Sequences, Tokens, linear_policy_loss, loss_weights

TEMPERATURES = (0.5, 1.0)
MASSES = (3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 3e-2, 1e-1)
PROBLEMS, RESPONSE_TOKENS = 24, 128


class Work(NamedTuple):
    """Rows of responses: hidden [T, D], head [V, D], targets [T], sequence_ids [T]."""

    hidden: torch.Tensor
    head: torch.Tensor
    targets: torch.Tensor
    sequence_ids: torch.Tensor


def responses(model_path: str, temperature: float) -> Work:
    """Sample responses to word problems, and compute the hidden states that predict their tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lead_fast.data.word_problems import make_problems

    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    turn = "{}\nLet's think step by step and put the final answer within \\boxed{{}}."
    chats = [
        [{"role": "user", "content": turn.format(p["problem"])}] for p in make_problems(PROBLEMS, seed=1, split="test")
    ]
    asked = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    prompts = tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(0)
    with torch.no_grad():
        ids = model.generate(**prompts, max_new_tokens=RESPONSE_TOKENS, do_sample=True, temperature=temperature,
                             top_p=1.0, top_k=0, repetition_penalty=1.0)  # fmt: skip
        first = prompts["input_ids"].shape[1]
        attended = torch.cat([prompts["attention_mask"], torch.ones_like(ids[:, first:])], 1)
        positions = (attended.cumsum(1) - 1).clamp(min=0)
        hidden = model.model(input_ids=ids, attention_mask=attended, position_ids=positions).last_hidden_state
    rows, targets, sequence_ids = [], [], []
    for i, response in enumerate(ids[:, first:]):
        ends = (response == tokenizer.eos_token_id).nonzero()
        n = int(ends[0]) + 1 if len(ends) else len(response)
        rows.append(hidden[i, first - 1 : first - 1 + n])
        targets.append(response[:n])
        sequence_ids.append(torch.full((n,), i))
    head = model.lm_head.weight.detach()
    return Work(torch.cat(rows), head, torch.cat(targets), torch.cat(sequence_ids))


def work_for(a: argparse.Namespace, temperature: float) -> Work:
    """Rows of a temperature, sampled once and then cached."""
    place = a.runs / f"rows-{temperature:g}.pt"
    if not place.is_file():
        a.runs.mkdir(parents=True, exist_ok=True)
        torch.save(responses(a.model or pretrained(a.runs / "base"), temperature)._asdict(), place)
    w = Work(**torch.load(place))
    if len(w.targets) < a.rows:
        raise SystemExit(f"error: {place} has {len(w.targets)} rows: give at most that many --rows.")
    return Work(w.hidden[: a.rows], w.head, w.targets[: a.rows], w.sequence_ids[: a.rows])


def measure(w: Work, temperature: float, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Measure times and errors of every way, by name."""
    hidden, head = w.hidden.to(dtype), w.head.to(dtype)
    tokens = Tokens(w.targets, w.sequence_ids)
    lengths = torch.bincount(w.sequence_ids)
    make = torch.Generator().manual_seed(0)
    advantages = torch.randn(len(lengths), generator=make)
    weights = loss_weights(lengths, n_sequences=len(lengths), n_tokens=len(w.targets))
    sequences = Sequences(weights, advantages)
    z = hidden.double() @ head.double().T / temperature
    one_hot = torch.nn.functional.one_hot(w.targets, len(head))
    probabilities = z.softmax(1)
    entropy = float(torch.special.entr(probabilities).sum(1).mean())
    g = -(weights * advantages)[w.sequence_ids].double()[:, None]
    exact = (g / temperature * (one_hot - probabilities)) @ head.double()
    del z, one_hot, probabilities

    def call(o: LossOptions, trains_head: bool) -> tuple[Any, torch.Tensor]:
        h, weight = hidden.detach().requires_grad_(), head.detach().requires_grad_(trains_head)
        out = linear_policy_loss(h, weight, tokens, sequences, o, temperature=temperature)
        out.loss.backward()
        assert h.grad is not None
        return out, h.grad

    buffer = torch.empty(len(hidden), len(head), dtype=dtype)
    calls: dict[str, Any] = {"one bare product": lambda: torch.mm(hidden, head.T, out=buffer)}
    notes: dict[str, dict[str, float]] = {}
    ways = [("dense", LossOptions())]
    ways += [(f"dropped_mass {mass:g}", LossOptions(dropped_mass=mass)) for mass in MASSES]
    for trains_head in (False, True):
        for name, o in ways[:4] if trains_head else ways:
            name += ", d(head) dense" if trains_head else ", head frozen"
            calls[name] = lambda o=o, trains_head=trains_head: call(o, trains_head)
            out, grad = call(o, trains_head)
            row_error = (grad.double() - exact).norm(dim=1)
            notes[name] = {"error": float(row_error.norm() / exact.norm()), "max_row_error": float(row_error.max())}
            if o.dropped_mass:
                T = len(hidden)
                notes[name] |= {k: float(out.metrics[k]) / T for k in ("dropped_mass", "column_share")}
                notes[name] |= {"bound": float(out.metrics["max_hidden_error"])}
    for mass in MASSES[1:3]:
        o = LossOptions(dropped_mass=mass, sparse_head=True)
        calls[f"dropped_mass {mass:g}, d(head) sparse"] = lambda o=o: call(o, True)
    times = {name: summary(ms) for name, ms in interleaved(calls, repeats, "cpu").items()}
    bare = times["one bare product"]["median_ms"]
    results = {name: t | {"bare_products": t["median_ms"] / bare} | notes.get(name, {}) for name, t in times.items()}
    return {"temperature": temperature, "dtype": str(dtype).removeprefix("torch."), "rows": len(hidden),
            "entropy_nats": entropy, "columns": len(head), "results": results}  # fmt: skip


def table(part: dict[str, Any]) -> str:
    lines = [
        f"\nT {part['rows']}, V {part['columns']}, {part['dtype']}, temperature {part['temperature']:g}, entropy "
        f"{part['entropy_nats']:.2f} nats",
        f"{'':44}{'ms':>7} {'products':>8} {'columns':>8} {'dropped':>8} {'error':>8} {'row error':>9} {'bound':>8}",
    ]
    for name, r in part["results"].items():
        cells = [f"{r[k]:{form}}" if k in r else "-" for k, form in (("column_share", ".2%"), ("dropped_mass", ".1e"),
                 ("error", ".1e"), ("max_row_error", ".1e"), ("bound", ".1e"))]  # fmt: skip
        lines.append(f"{name:44}{r['median_ms']:7.0f} {r['bare_products']:8.2f} {cells[0]:>8} {cells[1]:>8} "
                     f"{cells[2]:>8} {cells[3]:>9} {cells[4]:>8}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(
        description="Compare the sparse backward with the dense one, on a small model's own responses."
    )
    p.add_argument("--model", help="folder or hub name of another model; default: SmolLM2-135M-Instruct")
    p.add_argument("--rows", type=int, default=1024)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--temperature", type=float, choices=TEMPERATURES, help="only this one")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="only this one")
    p.add_argument("--runs", type=Path, default=Path("runs/sparse"), help="working folder")
    p.add_argument(
        "--out",
        type=Path,
        help="result; default: bench/results/sparse-cpu.json, with a suffix for --temperature and --dtype",
    )
    a = p.parse_args()
    only = ("" if a.temperature is None else f"-{a.temperature:g}") + (f"-{a.dtype}" if a.dtype else "")
    parts = []
    for temperature in TEMPERATURES if a.temperature is None else (a.temperature,):
        for dtype in ("float32", "bfloat16") if a.dtype is None else (a.dtype,):
            parts.append(measure(work_for(a, temperature), temperature, getattr(torch, dtype), a.repeats))
            print(table(parts[-1]), flush=True)
            write_json(a.out or RESULTS / f"sparse-cpu{only}.json", machine("cpu") | {"parts": parts}, quiet=True)


if __name__ == "__main__":
    main()
