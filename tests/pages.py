"""Pages of the documentation that follow from the code: configuration, metrics, and the reference.

    python tests/pages.py

writes docs/configuration.md, docs/metrics.md, docs/reference/kernels.md and docs/reference/commands.md. A test compares
them with what it would write, so that they stay current.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

import lead_kernels
from lead_fast.cli import (
    FLAGS,
    PRESETS,
    RECIPES,
    _descriptions,
    _leaves,
    bare,
    is_number,
    keys,
    range_of,
    type_of,
    wanted,
)
from lead_fast.config import Config, SftConfig
from lead_fast.runtime.metric_table import SECTIONS, Metric
from lead_fast.view.pages import healthy

ROOT = Path(__file__).resolve().parent.parent
MADE = "This page is the output of `python tests/pages.py`, from {}; a test keeps it current."


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table without the columns that are empty."""
    columns = [(name, *cells) for name, cells in zip(head, zip(*rows, strict=True), strict=True) if any(cells)]
    names, *cells = zip(*columns, strict=True)
    lines = [names, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(cell or ' ' for cell in row)} |" for row in lines)


def cell(text: str) -> str:
    """Prose for a cell: backslashes and pipes as themselves, names in code's type."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p.replace("|", r"\|") if p.startswith("`") else prose(p) for p in parts)


def prose(text: str) -> str:
    """Text outside of code: flags, tags and LaTeX as code, pipes and stars escaped."""
    flag = r"(?<![\w`])--[a-z][\w.-]*(?:='[^']*'|=[\w./~-]+)?(?<![.-])"
    text = re.sub(rf"\\boxed\{{[^}}]*\}}|{flag}|[*_]{{2,}}|\S*</?\w+>[\w<>/-]*", lambda m: f"`{m[0]}`", text)
    return re.sub(r"(?<!`)([|*])(?!`)", r"\\\1", text)


def code(value: Any) -> str:
    """A value as the command line takes it, as code."""
    if value is None or value == () or value == {} or value == "":
        return "none" if value is None else "empty"
    text = value if isinstance(value, str) else json.dumps(value)
    return "`" + text.replace("|", r"\|") + "`"


# ------------------------------------------------------------------------------------------------------ configuration


def short(number: float) -> str:
    """A bound as a reader says it."""
    for base, exponents in ((10, range(6, 13)), (2, range(24, 33))):
        for e in exponents:
            for off in (0, -1):
                if abs(number) == base**e + off:
                    return f"{'-' * (number < 0)}{base}^{e}{' - 1' * (off < 0)}"
    return f"{number:g}"


def values(key: str, cls: Any) -> str:
    """What a key takes."""
    kind, allowed = bare(type_of(key, cls)), range_of(key, cls)
    if not is_number(kind) or not allowed:
        return cell(wanted(key, cls).replace("one of ", ""))
    low, high = short(allowed.low), short(allowed.high)
    limits = f"{'above ' * allowed.above}{low} {'to below' if allowed.below else 'to'} {high}"
    count = f"{len(get_args(kind))} numbers, each " if get_origin(kind) is tuple else ""
    whole = "whole, " if "int" in str(kind) else ""
    return (
        count
        + whole
        + limits
        + ", or none" * (type(None) in get_args(kind))
        + f"; 0: {allowed.zero}" * bool(allowed.zero)
    )


def given_by(key: str, cls: Any) -> str:
    """Recipes and presets that set a key, with the value."""
    folders = [("", RECIPES), ("preset ", PRESETS), ("SFT ", RECIPES / "sft")]
    if cls is SftConfig:
        folders = folders[2:]
    elif key not in keys(SftConfig) or "." not in key:
        folders = folders[:2]
    by_value: dict[str, list[str]] = {}
    for kind, folder in folders:
        for path in sorted(folder.glob("*.toml")):
            for leaf, value in leaves(path).items():
                if leaf == key:
                    by_value.setdefault(code(value), []).append(kind + path.stem)
    return "<br>".join(f"{value}: {', '.join(names)}" for value, names in by_value.items())


def leaves(path: Path) -> dict[str, Any]:
    """Dotted key -> value of a TOML file."""
    import tomllib

    tree = tomllib.loads(path.read_text(encoding="utf-8"))
    out = {}
    for leaf in _leaves(tree, keys(SftConfig if path.parent.name == "sft" else Config)):
        value: Any = tree
        for part in leaf.split("."):
            value = value[part]
        out[leaf] = value
    return out


def key_table(names: list[str], cls: Any) -> str:
    rows = []
    for name in names:
        section, _, field = name.rpartition(".")
        owner = type_of(section, cls) if section else cls
        default = {f.name: f for f in dataclasses.fields(owner)}[field]
        value = default.default if default.default is not dataclasses.MISSING else default.default_factory()  # type: ignore
        text = cell(_descriptions(owner)[field])
        rows.append([f"`{name}`", code(value), values(name, cls), text, given_by(name, cls)])
    return table(("key", "default", "values", "meaning", "set by"), rows)


def first_comment(path: Path) -> str:
    """The sentence that a TOML file begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return re.split(r'(?<=[.]) (?=[A-Z"`-])', " ".join(lines))[0]


def files_table(kind: str, folder: Path) -> str:
    """TOML files with what they begin by saying."""
    rows = [(p.stem, cell(first_comment(p))) for p in sorted(folder.glob("*.toml"))]
    return table((kind, "what it is"), rows)


def sections(cls: Any) -> dict[str, list[str]]:
    """Section -> its keys, `` for those on top."""
    out: dict[str, list[str]] = {}
    for key in keys(cls):
        out.setdefault(key.rpartition(".")[0], []).append(key)
    return out


def configuration() -> str:
    parts = [
        "# Configuration",
        "Every key can stand in a TOML file (`--config FILE`) or on the command line (`--section.key=value`). Later "
        "wins: the defaults below, the recipe over the preset it names, `--preset`, the command line. `--help` prints "
        "every key with its value under a recipe, `--dry-run` the configuration that would run. A value outside its "
        "range, or a key that does not exist, ends the command in one sentence before a model is loaded.",
        MADE.format("`lead_fast/config.py` and the recipes"),
        "## Flags",
        table(("flag", "meaning"), [(f"`{flag}`", cell(text)) for flag, text in FLAGS.items()]),
        "## Recipes and presets",
        "`--recipe NAME`, of training and evaluation:",
        files_table("recipe", RECIPES),
        "`--recipe NAME` of `lead_fast.sft`:",
        files_table("recipe", RECIPES / "sft"),
        "`--preset NAME`, laid over a recipe:",
        files_table("preset", PRESETS),
    ]  # fmt: skip
    for section, names in sections(Config).items():
        title, about = section or "general", "Of training and evaluation."
        if section:
            about = inspect.getdoc(type_of(section, Config)) or ""
        parts += [f"## {title}", cell(" ".join(about.split())), key_table(names, Config)]
    own = sections(SftConfig)
    shared = ", ".join(f"`{s}`" for s in own if s)
    parts += [
        "## SFT",
        f"`lead_fast.sft` reads the sections {shared} as above, and on top, in place of the general keys:",
        key_table(own[""], SftConfig),
        "## Evaluation",
        "`lead_fast.evaluate` reads training's sections `model`, `data`, `rollout`, `reward` and `evaluate`. Where no "
        "recipe is named, a run directory's own configuration holds. Its flags are in "
        "[Commands](reference/commands.md#lead_fastevaluate).",
    ]
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------------ metrics


def listed(words: list[str]) -> str:
    """`a`, `b` and `c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def range_of_metric(m: Metric) -> str:
    if m.spike:
        return "up to 10 times its median over 50 steps"
    return healthy(m, m.low, m.high).removeprefix("healthy: ")


def advice(m: Metric) -> str:
    text = f"{m.outside[:1].upper()}{m.outside[1:]}. {m.remedy}" if m.outside else m.remedy
    return cell(text.strip())


def metrics() -> str:
    parts = [
        "# Metrics",
        "RUN_DIR/metrics.jsonl holds one JSON object per line: a `train` record for each step, an `eval` record for "
        "each evaluation, an `sft` record for each step of `lead_fast.sft`. TensorBoard and Weights & Biases get every "
        "number of them under `train/*`, `eval/*` and `sft/*`, a list's elements by their place. `null` stands for a "
        "number that does not exist, such as the length of wrong responses where none is wrong.",
        "Healthy ranges are rules of thumb, not limits: the page of `python -m lead_fast.report RUN_DIR --serve` marks "
        "what is outside of them, and two kinds are printed as warnings and kept in `alerts`: spikes of `loss` and "
        "`grad_norm`, and a `logprob_diff_mean` outside its range. The last column says what ends a run.",
        MADE.format("`lead_fast/runtime/metric_table.py`"),
    ]
    for s in SECTIONS:
        rows = [
            (f"`{m.key}`" + ", `_ci`" * m.interval, m.unit, cell(m.meaning), range_of_metric(m), advice(m))
            for m in s.metrics
        ]
        parts += [f"## {s.title}", cell(f"In {listed([f'`{k}`' for k in s.kinds])} records. {s.about}".strip())]
        parts.append(table(("key", "unit", "meaning", "healthy", "how to read it, what to do"), rows))
        if any(m.interval for m in s.metrics):
            parts.append(
                "`_ci`: the same key with `_ci` holds [low, high] of the 95 % bootstrap interval over problems."
            )
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------- reference


def summary(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


KERNELS = {
    "Functions": (
        "lead_advantages", "batch_std", "linear_policy_loss", "policy_loss", "linear_logprobs", "loss_weights",
    ),
    "Options": ("LossOptions", "AdvantageOptions"),
    "Records": ("Outcomes", "Groups", "Tokens", "Sequences", "LeadAdvantages", "PolicyLoss"),
}  # fmt: skip


def call(name: str) -> list[str]:
    """How a function is called, as a block of code; nothing for a class."""
    thing, shown, given = getattr(lead_kernels, name), [], ""
    if inspect.isclass(thing):
        return []
    for p in inspect.signature(thing).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not given:
            shown.append(given := "*")
        default = f"{type(p.default).__name__}()" if dataclasses.is_dataclass(p.default) else repr(p.default)
        shown.append(p.name if p.default is p.empty else f"{p.name}={default}")
    text = textwrap.fill(", ".join(shown), 64, break_long_words=False)
    return [f"```python\n{name}({text.replace(chr(10), chr(10) + ' ' * (len(name) + 1))})\n```"]


def kernels() -> str:
    public = [name for names in KERNELS.values() for name in names]
    assert sorted(public) == sorted(lead_kernels.__all__)
    rows = [(f"[`{name}`](#{name.lower()})", cell(summary(getattr(lead_kernels, name)))) for name in public]
    parts = [
        "# lead_kernels",
        summary(lead_kernels) + " It imports torch and triton only, and is used alone as "
        "`from lead_kernels import linear_policy_loss`. On CUDA Triton runs, on a CPU the C++ of csrc; the plain torch "
        "form is the specification. Formulas and costs: [Kernels](../kernels.md).",
        "Shapes: S sequences (responses), T packed tokens, P problems, D hidden, V vocabulary.",
        "This page's list is the output of `python tests/pages.py`; the site adds arguments, results and "
        "errors from the docstrings of `kernels/lead_kernels/`.",
        table(("name", "what it is"), rows),
    ]
    for title, names in KERNELS.items():
        parts.append(f"## {title}")
        for name in names:
            home = getattr(lead_kernels, name).__module__
            parts += [f"### {name}", *call(name), f"::: {home}.{name}"]
    return "\n\n".join(parts) + "\n"


COMMANDS = ("train", "sft", "evaluate", "plan", "report", "release", "machine", "data")


def arguments(name: str) -> list[tuple[str, str, str]]:
    """Flag, default and meaning of what a command's own file hands to argparse."""
    module, out = importlib.import_module(f"lead_fast.{name}"), []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            flag = ast.literal_eval(node.args[0])
            words = {k.arg: eval(ast.unparse(k.value), vars(module)) for k in node.keywords}
            if flag.startswith("--"):
                default = words.get("default")
                out.append((f"`{flag}`", "" if default in (None, []) else f"`{default}`", cell(words["help"])))
    return out


def blocks(text: str) -> str:
    """A docstring as Markdown: indented lines are code, and `...` in front of them stays."""
    out = []
    for part in re.split(r"\n\s*\n", text):
        lines = part.splitlines()
        if all(x.startswith("    ") for x in lines) or lines[0].startswith(("python -m", "torchrun")):
            out.append("```\n" + textwrap.dedent(part).rstrip() + "\n```")
        else:
            out.append(cell(" ".join(x.strip() for x in lines)))
    return "\n\n".join(out)


def commands() -> str:
    parts = [
        "# Commands",
        "Every command answers `--help`. Those that take `--section.key=value` read the "
        "[configuration](../configuration.md). " + MADE.format("the commands' docstrings and the Makefile"),
    ]
    rows, bodies = [], []
    for name in COMMANDS:
        file = "data/prepare.py" if name == "data" else f"{name}.py"
        text = ast.get_docstring(ast.parse((ROOT / "lead_fast" / file).read_text(encoding="utf-8"))) or ""
        first, _, rest = text.partition("\n\n")
        if name == "data":  # its docstring gives the subcommands alone
            first = first.split(":")[0] + "."
            rest = re.sub(r"^    ", "    python -m lead_fast.data ", rest, flags=re.M)
        first = " ".join(first.split()).removesuffix(" Read this first.")
        rows.append((f"[`lead_fast.{name}`](#lead_fast{name})", cell(first)))
        bodies += [f"## lead_fast.{name}", cell(first), blocks(rest)]
        if name in ("plan", "report", "release", "machine"):
            bodies.append(table(("flag", "default", "meaning"), arguments(name)))
    parts += [table(("command", "what it does"), rows), *bodies, "## make"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z0-9-]+):[^#\n]*## (.*)$", makefile, re.M)
    parts.append(table(("target", "what it does"), [(f"`make {t}`", cell(text)) for t, text in targets]))
    parts.append("## bench")
    scripts = []
    for path in sorted((ROOT / "bench").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8") and path.stem != "gpu_parts":
            scripts.append((f"`python bench/{path.name}`", cell((ast.get_docstring(tree) or "").split("\n")[0])))
    parts.append(table(("script", "what it measures"), scripts))
    return "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "docs/configuration.md": configuration,
    "docs/metrics.md": metrics,
    "docs/reference/kernels.md": kernels,
    "docs/reference/commands.md": commands,
}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_text(make(), encoding="utf-8")
