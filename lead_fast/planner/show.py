"""Format the plan as text."""

from typing import Any

from ..runtime.hardware import GIB
from .ladder import PESSIMISTIC_ACCEPTED
from .published import Published


def table(rows: dict[str, float], unit: float = GIB, digits: int = 1) -> str:
    """One line per name and number."""
    return "".join(f"    {name:28}{value / unit:10.{digits}f}\n" for name, value in rows.items())


def show(p: dict[str, Any]) -> str:
    """Format every number of a plan, in the order in which a reader needs them."""
    sections = (heading(p), memory(p), time(p), engines(p), ladders(p), validation(p), assumptions(p),
                "It fits." if p["remedy"] is None else f"It does not fit. {p['remedy']}")  # fmt: skip
    return "\n\n".join(section.rstrip("\n") for section in sections)


def heading(p: dict[str, Any]) -> str:
    return (
        f"{p['recipe']}: {p['model']}, {p['parameters'] / 1e9:.2f} billion parameters, on {p['gpus']} x {p['device']} "
        f"of {p['device_bytes'] / GIB:.1f} GiB (predicted, not measured)\n"
        f"  activation checkpointing {p['activation_checkpointing']}, reshard {str(p['reshard']).lower()}, replicate "
        f"{p['replicate']}, packs of {p['pack_tokens']} tokens, longest sequence {p['longest_sequence']}"
    )


def memory(p: dict[str, Any]) -> str:
    generation = p["generation_bytes"]
    packs = ", ".join(f"{k}: {v or 'none'}" for k, v in p["largest_pack_tokens"].items())

    def verdict(name: str) -> str:
        return f"{p['needs_bytes'][name] / GIB:.1f} GiB, {'fits' if p['fits'][name] else 'DOES NOT FIT'}"

    lines = [
        f"Memory of a GPU in training, GiB, at the peak ({p['training_peak']}):",
        table(p["training_bytes"]) + table({"sum": sum(p["training_bytes"].values())}),
        "Memory of a GPU in generation, GiB (gradients and gathered parameters freed, engine awake):",
        table(generation) + table({"sum": sum(generation.values())})
        + f"    a cache of {max(0, p['kv_tokens']):,.0f} tokens"
        + ("" if p["fits"]["key-value cache"] else ", LESS THAN ONE RESPONSE"),
        "\nIncluding the allocator's loss, CUDA and a sleeping engine:",
        *(f"    {name:28}{verdict(name)}" for name in p["needs_bytes"]),
        f"\nLargest parallel.pack_tokens by activation checkpointing: {packs}",
    ]  # fmt: skip
    return "\n".join(lines)


def time(p: dict[str, Any]) -> str:
    t, f, other = p["tokens_per_s_per_gpu"], p["mfu"], p["other_share"]
    calls = ", ".join(f"{v:.0f} {k}" for k, v in p["traffic_calls_per_pack"].items() if v)
    mean, most = p["staleness"]
    twice = p["step_s"] - p["seconds"]["rollout"] + p["rollout_twice_s"]
    age = f", {mean:.2f} updates old on average, {most} at most" if most else ""
    lines = [
        f"Traffic of a GPU in a step, GB ({p['packs_per_rank']} packs per rank; first pack: {calls}):",
        table(p["traffic_gb_per_step"], 1.0),
        f"Seconds of a step of {p['responses']} responses, {p['tokens']:,.0f} tokens{age}:",
        table(p["seconds"] | {"step": p["step_s"], "step, iterations x 2": twice}, 1.0, 2),
        f"    tokens/s per GPU: {t['training']:,.0f} in training (without rollout and sync), {t['step']:,.0f} overall",
        f"    MFU in training: {100 * f['training']['causal']:.1f} % (causal attention), "
        f"{100 * f['training']['torchtitan']:.1f} % (torchtitan's); in the step {100 * f['step']['causal']:.1f} %",
        f"    neither product nor attention, by bytes: {100 * other['as configured']:.1f} % of forward and backward "
        f"(RMSNorm, RoPE, SwiGLU as one kernel each, model.liger: {100 * other['fused']:.1f} %; as torch's operators: "
        f"{100 * other['torch']:.1f} %)",
        f"    balance of the ranks {100 * p['balance']:.1f} %",
    ]  # fmt: skip
    return "\n".join(lines)


def engines(p: dict[str, Any]) -> str:
    lines = ["Engine settings by simulated rollout (rollout.tensor_parallel, batch_size, gpu_memory):"]
    for s in p["settings"]:
        lines.append(f"    --rollout.tensor_parallel={s['tensor_parallel']} --rollout.batch_size={s['batch_size']:<4} "
                     f"--rollout.gpu_memory={s['gpu_memory']:<5g}{s['seconds']:8.1f} s"
                     f"{', as configured' if s['configured'] else ''}")  # fmt: skip
    if not any(s["configured"] for s in p["settings"]):
        lines.append(f"    as configured{p['seconds']['rollout']:60.1f} s")
    return "\n".join(lines)


def ladders(p: dict[str, Any]) -> str:
    lines = ["The ladder, each rung with all above it: seconds of a step (x2: with iterations twice as long; low: with "
             f"{PESSIMISTIC_ACCEPTED} tokens accepted)"]  # fmt: skip
    for device, rungs in p["ladder"].items():
        if not rungs:
            lines.append(f"  {p['gpus']} x {device}: training does not fit")
            continue
        lines.append(
            f"  {p['gpus']} x {device:8}{'':22}engine   rollout  train    step      x2     low  low x2  "
            "tokens/s  GPU-h per  updates old"
        )
        lines.append(f"{'':68}{'per GPU':>37}  100 steps  mean (most)")
        for r in rungs:
            s, rollout = r["setting"], r["rollout"]
            low = "".join(f"{x:8.0f}" for x in r["step_low_s"]) if r["step_low_s"] else f"{'':16}"
            rate, gpu_hours = rollout["tokens"] / r["step_s"] / p["gpus"], r["step_s"] * p["gpus"] / 36
            lines.append(
                f"    {r['name']:31} TP {s['tensor_parallel']} {s['batch_size']:4}{rollout['seconds']:8.0f}"
                f"{r['train_s']:7.0f}{r['step_s']:8.0f}{r['step_twice_s']:8.0f}{low}{rate:10,.0f}"
                f"{gpu_hours:11.0f}  {rollout['staleness']:.2f} ({rollout['stalest']})"
                + (f"   not in the code: {', '.join(r['missing'])}" if r["missing"] else "")
            )
        last = rungs[-1]
        spoiled = p["worst"]["rollout"] * last["rollout"]["seconds"] + p["worst"]["training"] * last["train_s"]
        goal = f"; the goal is {p['goals'][device]:.0f} s" if device in p["goals"] else ""
        lines.append(
            f"    the last rung, with the errors of the worst published run in both halves: {spoiled:.0f} s{goal}"
        )
    return "\n".join(lines)


def validation(p: dict[str, Any]) -> str:
    lines = ["The same assumptions, compared with published measurements:"]
    for row in p["published"]:
        x = Published(**{k: v for k, v in row.items() if k != "error"})
        lines.append(f"    {x.what:36}{x.measured:9,.1f} {x.unit:17}predicted {x.predicted:8,.1f}"
                     f"  {100 * x.error:+4.0f} %   {x.source}")  # fmt: skip
    return "\n".join(lines)


def assumptions(p: dict[str, Any]) -> str:
    lines = [
        "Measured:" if p["measured"] else f"Measured: nothing; bench/results has no gpu-{p['device']} files, which "
        "make gpu writes.",
        *(f"    {k:18}{value:<9.3g}{why}" for k, (value, why) in p["measured"].items()),
        *(f"    from {file}, {of}" for file, of in p["measured_on"].items()),
        "Still assumed:" if p["measured"] else "Assumptions:",
        *(f"    {k:18}{value:<9g}{why}" for k, (value, why) in p["assumptions"].items()),
    ]  # fmt: skip
    return "\n".join(lines)
