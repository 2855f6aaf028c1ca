"""Test the rules of the repository: documents name what exists, imports, and answers to configuration mistakes."""

import ast
import dataclasses
import importlib.util
import io
import math
import re
import sys
import tokenize
from pathlib import Path
from typing import Any, get_origin

import pytest
from jobs import ROOT, commands, python

from lead_fast.checks import check, check_sft, check_values
from lead_fast.cli import PRESETS, RECIPES, bare, dump, is_number, keys, load_config, names, ranges, type_of
from lead_fast.config import Config, SftConfig

pytestmark = pytest.mark.quick

EVIDENCE = ROOT / "docs" / "evidence"  # output of commands
DOCS = [
    *sorted(ROOT.glob("*.md")),
    *(p for p in sorted((ROOT / "docs").rglob("*.md")) if EVIDENCE not in p.parents),
]


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, relative imports as `.name`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." + (node.module or "") if node.level else (node.module or "").split(".")[0])
    return found


def test_find_spec_kernels_finds_no_package_of_ours():
    spec = importlib.util.find_spec("kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert spec is None or spec.origin is None or not str(spec.origin).startswith(str(ROOT))


def test_lead_kernels_stands_alone():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "lead_kernels"}
    for path in (ROOT / "kernels" / "lead_kernels").rglob("*.py"):
        outside = {m for m in imports(path) if not m.startswith(".")} - allowed
        assert not outside, f"{path.name} imports {outside}"


ON_TOP = {"config", "records", "checks", "cli"}  # library that every wing may import
BELOW = {"runtime": set(), "reward": set(), "view": {"runtime"}, "data": {"runtime", "reward"},
         "learner": {"runtime", "reward"}, "rollout": {"runtime", "data", "reward", "learner"},
         "planner": {"runtime", "learner"}}  # fmt: skip
LIFTED = {
    ("data", "prepare"): {"learner", "report"},
    ("data", "check"): {"learner"},
}  # commands inside a wing


def inner_imports(path: Path) -> set[tuple[str, str]]:
    """(wing or "", module) of every lead_fast module that a file imports, including imports inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]  # ("lead_fast",) or ("lead_fast", wing)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            parts = [p for p in base[1:] if p]
            for name in [a.name for a in node.names] if not node.module else [""]:
                full = [*parts, name] if name else parts
                found.add((full[0], full[1]) if len(full) > 1 else ("", full[0]))
    return found


def test_wings_import_only_what_is_below_them():
    for wing, below in BELOW.items():
        for path in sorted((ROOT / "lead_fast" / wing).glob("*.py")):
            allowed = below | LIFTED.get((wing, path.stem), set())
            for where, module in inner_imports(path):
                assert where in {wing, *allowed} or (not where and module in ON_TOP | allowed), (
                    f"{wing}/{path.name} imports {where or 'lead_fast'}.{module}"
                )


KERNELS = ROOT / "kernels" / "lead_kernels"


def kernel_imports(path: Path) -> set[tuple[str, ...]]:
    """Modules of lead_kernels that one of its files imports, also inside functions and by name through importlib."""
    package, out = path.relative_to(KERNELS).parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else ()))
            out |= {base} if node.module else {(*base, a.name) for a in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"lead_kernels(\.\w+)+", node.value):
                out.add(tuple(node.value.split(".")[1:]))
    return out


def test_no_import_circle_in_lead_kernels():
    files = {p for p in KERNELS.rglob("*.py") if p.name != "__init__.py"}
    edges = {p.relative_to(KERNELS).with_suffix("").parts: kernel_imports(p) for p in files}
    assert ("_triton_rows",) in edges[("_rows",)] and ("records",) in edges[("_triton_rows",)]
    refuse_circles(edges)


def test_no_import_circle():
    files = {p for p in (ROOT / "lead_fast").rglob("*.py") if p.name != "__init__.py"}
    edges = {}
    for path in files:
        name = (path.parent.name if path.parent.name != "lead_fast" else "", path.stem)
        edges[name] = inner_imports(path)
    refuse_circles(edges)


def refuse_circles(edges: dict) -> None:
    done: set = set()

    def visit(node, above):
        assert node not in above, f"a circle: {' -> '.join('.'.join(n) for n in [*above, node])}"
        if node not in done:
            for following in sorted(edges.get(node, ())):
                visit(following, [*above, node])
            done.add(node)

    for node in sorted(edges):
        visit(node, [])


def test_the_step_of_grpo_lead_fits_on_one_screen():
    tree = ast.parse((ROOT / "lead_fast" / "train.py").read_text(encoding="utf-8"))
    (train,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train"]
    (loop,) = [n for n in ast.walk(train) if isinstance(n, ast.For)]
    for part in (train, loop):
        assert (part.end_lineno or 0) - part.lineno < 60
    calls = [ast.unparse(n.func) for n in ast.walk(loop) if isinstance(n, ast.Call)]
    for verb in ("sampler.collect", "advantages", "learner.step", "publish", "journal.step"):
        assert verb in calls
    assert len((ROOT / "lead_fast" / "train.py").read_text().splitlines()) <= 170


def test_wings_are_one_level_deep():
    assert {p.parent for p in (ROOT / "lead_fast").rglob("*.py")} == {
        ROOT / "lead_fast",
        *(ROOT / "lead_fast" / wing for wing in BELOW),
    }


def test_vllm_is_imported_in_one_file_at_most():
    users = [p.name for p in (ROOT / "lead_fast").rglob("*.py") if "vllm" in imports(p)]
    assert users in ([], ["vllm_engine.py"])


EACH_DOC = pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(ROOT)))


@EACH_DOC
def test_paths_and_commands_in_documents_exist(doc: Path):
    text = doc.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(
        r"\bmake ([a-z0-9-]+)", " ".join(re.findall(r"`[^`]+`|^    .*$|```.*?```", text, re.M | re.S))
    ):
        assert target in targets, f"{doc.name} names `make {target}`"
    for module in re.findall(r"-m (lead_\w+(?:\.\w+)+)", text):
        assert importlib.util.find_spec(module), f"{doc.name} names module {module}"
    spans = (
        re.findall(r"`([^`\n]+)`", text) + re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"python (\S+\.py)", text)
    )
    for span in spans:
        word = span.split("#")[0].strip()
        if re.fullmatch(r"[\w./-]+\.(?:py|md|toml|json|jsonl|png|cpp|h)", word) or re.fullmatch(r"(?:[\w.-]+/)+", word):
            if not word.startswith(("runs/", "RUN_DIR", "my-", "checkpoints/")) and "N" not in word.split("/"):
                places = [ROOT, doc.parent, ROOT / "lead_fast", ROOT / "kernels" / "lead_kernels", ROOT / "docs"]
                places += [ROOT / "lead_fast" / wing for wing in BELOW]
                assert any((p / word).exists() for p in places) or word in GENERATED, f"{doc.name} names {word}"
    for key in re.findall(r"--([a-z]+(?:\.[a-z_]+)+)", text):
        assert key in {*keys(Config), *keys(SftConfig)} or stands_for_keys(key), f"{doc.name} names --{key}"
    for name in re.findall(rf"`({'|'.join(SECTION_NAMES)})\.([a-z_.]+)(?:=[^`]*)?`", text):
        if name[1].rpartition(".")[2] not in ("py", "md", "toml", "json", "jsonl", "key"):
            assert ".".join(name) in {*keys(Config), "rollout.speculative"}, f"{doc.name} names {'.'.join(name)}"


def stands_for_keys(flag: str) -> bool:
    """Whether a flag is a pattern, such as --section.key, or one of the chat template's own arguments."""
    return flag.endswith(".key") or flag.startswith("data.template.")


SECTION_NAMES = [f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)]
SOURCES = {
    p: p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("*/*.py")) + sorted(ROOT.glob("lead_fast/*/*.py"))
}


@EACH_DOC
def test_flags_recipes_and_presets_in_documents_exist(doc: Path):
    text = re.sub(r"\\\n\s*", "", doc.read_text(encoding="utf-8"))
    for module, script, rest in re.findall(r"(?:-m (lead_fast\.\w+)|python ((?:bench|tests)/\w+\.py))([^`\n]*)", text):
        sources = [p for p in SOURCES if p.is_relative_to(ROOT / "lead_fast")] if module else [ROOT / script]
        accepted = {f for p in sources for f in re.findall(r'"--([\w-]+)[="]', SOURCES[p])}
        accepted |= {f for p in sources if 'f"--{' in SOURCES[p] for f in re.findall(r'"(\w+)"', SOURCES[p])}
        accepted |= {"KEY", *(f"{name}_column" for name in ("problem", "reference", "solution"))}
        accepted |= {"config", "model", "dry-run", "help", *keys(Config), *keys(SftConfig)} if module else set()
        for flag in re.findall(r"--([A-Za-z][\w.-]*)", re.split(r"&&|[#|;]| and ", rest)[0]):
            assert flag in accepted or stands_for_keys(flag), f"{doc.name}: {module or script} --{flag}"
    for kind, known in (("recipe", {*names(RECIPES), *names(RECIPES / "sft")}), ("preset", {*names(PRESETS)})):
        for name in re.findall(rf"--{kind}[ =]([\w./-]+)", text):
            fits = name.isupper() or name.endswith(".toml") or name in known
            assert fits, f"{doc.name} names the {kind} {name}"


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site generate them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h) for h in re.findall(r"^#+ (.+?) *$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@EACH_DOC
def test_links_in_documents_lead_to_a_file_and_a_heading(doc: Path):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", doc.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (doc.parent / file).resolve() if file else doc
        assert target.exists() and target.is_relative_to(ROOT), f"{doc.name} links to {link}"
        if anchor:
            assert target.suffix == ".md" and anchor in anchors(target), f"{doc.name} links to {link}"


def test_every_page_is_in_the_sites_navigation():
    listed = re.findall(
        r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / ".ci" / "mkdocs.yml").read_text(encoding="utf-8"), re.M
    )
    pages = {str(p.relative_to(ROOT / "docs")) for p in DOCS if ROOT / "docs" in p.parents}
    assert len(listed) == len(set(listed)) and {*listed} - {"contributing.md", "changelog.md"} == pages


def prose(path: Path) -> list[str]:
    """Comments and docstrings of a Python file, including those of fields."""
    text = path.read_text(encoding="utf-8")
    out = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            out.append(node.value.value)
    return out


CODE = [p for top in ("lead_fast", "kernels", "bench", "tests") for p in sorted((ROOT / top).rglob("*.py"))]


@pytest.mark.parametrize("path", [*CODE, ROOT / "setup.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_named_in_comments_and_docstrings_exist(path: Path):
    places = [ROOT, path.parent, *(ROOT / top for top in ("lead_fast", "kernels/lead_kernels", "csrc", "docs"))]
    places += [ROOT / "lead_fast" / wing for wing in BELOW]
    for text in prose(path):
        for word in re.findall(r"(?<![\w*<>{}./-])[\w./-]*\w\.(?:py|md|toml|jsonl?|png|cpp|h)\b", text):
            placeholder = re.search(r"\b(?:FILE|RUN_DIR|step-N)\b", word)
            assert placeholder or word in GENERATED | WRITTEN or any((p / word).exists() for p in places), (
                f"{path.relative_to(ROOT)} names {word}, which is not in the repository"
            )


def test_make_check_cuda_runs_every_file_of_kernel_tests():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"^KERNEL_TESTS := (.*)$", makefile, re.M)[0].split()
    users = {p for p in (ROOT / "tests").rglob("test_*.py") if "lead_kernels" in imports(p)}
    assert users and users <= {p for pattern in named for p in ROOT.glob(pattern)}
    recipe = re.findall(r"^check-cuda:.*\n((?:\t.*\n)+)", makefile, re.M)[0]
    assert "pytest -q $(KERNEL_TESTS)" in recipe


WRITTEN = {"train.jsonl", "test.jsonl", "compare.png", "seconds.json", "extra.json", "config.json", "solved.jsonl",
           "avx512fintrin.h"}  # outputs, and last a header of the compiler  # fmt: skip
GENERATED = {
    "docs/evidence/pipeline/",
    "samples.jsonl",
    "evaluation.png",
    "final/",
    "table.md",
    "metrics.jsonl",
    "responses.jsonl",
    "config.toml",
    "report.html",
    "evaluation.json",
    "configuration.md",
    "metrics.md",
    "solved.jsonl",
    "generation_config.json",
}


def test_configuration_is_one_small_described_tree():
    files = (ROOT / "lead_fast" / "config.py", ROOT / "kernels" / "lead_kernels" / "options.py")
    nodes = [node for path in files for node in ast.parse(path.read_text(encoding="utf-8")).body]
    assert len(keys(Config)) <= 125 and len(keys(SftConfig)) <= 115
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            for field, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and "default_factory" not in ast.unparse(field):
                    described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    assert described, f"{node.name}.{ast.unparse(field.target)} has no description"


@pytest.mark.parametrize("recipe", names(RECIPES))
@pytest.mark.parametrize("preset", ["", *names(PRESETS)])
def test_every_recipe_and_preset_loads_and_survives_a_dump(recipe, preset, tmp_path):
    c = load_config(["--recipe", recipe] + (["--preset", preset] if preset else []))
    check(c, 1)
    (tmp_path / "c.toml").write_text(dump(c))
    again = load_config(["--config", str(tmp_path / "c.toml")])
    assert dump(again).replace(str(tmp_path / "c.toml"), recipe) == dump(c)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda p: p.stem)
def test_every_value_of_a_recipe_says_where_it_is_from(path):
    text = path.read_text(encoding="utf-8")
    if "every value is our choice" in text:
        return
    for line in re.findall(r"^\w+ = .*$", text, re.M):
        assert re.search(r"# (?:paper|released|ours)\b", line), f"{path.name}: {line}"


def test_a_dump_keeps_what_was_given_over_a_preset(tmp_path):
    c = load_config(["--preset=official", "--rollout.temperature=0.6"])
    (tmp_path / "c.toml").write_text(dump(c))
    again = load_config(["--config", str(tmp_path / "c.toml")])
    assert (again.preset, again.rollout.temperature, again.reward.grade) == ("official", 0.6, "before_think")
    assert load_config(["--config", str(tmp_path / "c.toml"), "--preset=official"]).rollout.temperature == 0.8
    assert load_config(["--recipe=lead-14b-official"]).advantage.length_gate == 4000


def numeric_keys(cls: Any) -> list[str]:
    return [key for key in keys(cls) if is_number(type_of(key, cls))]


def given(key: str, x: Any, cls: Any) -> str:
    return f"--{key}=[{x}, {x}]" if get_origin(bare(type_of(key, cls))) is tuple else f"--{key}={x}"


def refuses(arg: str, cls: Any) -> str:
    """Return the message with which the configuration refuses an argument; fails if it accepts it."""
    with pytest.raises(ValueError) as e:
        c = load_config([arg], cls=cls)
        check(c, 1) if cls is Config else check_sft(c)
    said = str(e.value)
    assert "\n" not in said and said.startswith(f"{arg[2:].split('=')[0]} is ")
    return said


@pytest.mark.parametrize("cls, key", [(cls, key) for cls in (Config, SftConfig) for key in numeric_keys(cls)])
def test_every_number_has_a_range_and_nothing_outside_it_is_accepted(cls, key):
    assert key in ranges(cls), f"{key} is a number without a range: declare one in config.py"
    allowed, whole = ranges(cls)[key], "int" in str(bare(type_of(key, cls)))
    step = 1 if whole else None
    outside = [allowed.low - step, allowed.high + step] if step else [
        math.nextafter(allowed.low, -math.inf), math.nextafter(allowed.high, math.inf), -1e300, 1e300]  # fmt: skip
    outside += [-(10**30), 10**30, "nan", "inf", "-inf", "1e999", "words", ""]
    outside += [allowed.low] * allowed.above + [allowed.high] * allowed.below
    for x in outside:
        said = refuses(given(key, x, cls), cls)
        assert str(allowed) in said
        number = x if isinstance(x, str) and x[-1:].isalpha() else float(x or "nan")
        assert str(x) in said or str(number) in said, said
    for x, out in ((allowed.low, allowed.above), (allowed.high, allowed.below)):
        inner = math.nextafter(x, allowed.high if x == allowed.low else allowed.low) if out else x
        check_values(load_config([given(key, inner, cls)], cls=cls))


def test_true_is_not_a_number_and_a_list_is_valid_json(tmp_path):
    for text in ("steps = true", "[optim]\nlr = false", "[optim]\nbetas = true", "[reward]\ntruncated = true"):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(ValueError, match=r"is (true|false): give a"):
            load_config(["--config", str(tmp_path / "c.toml")])
    (tmp_path / "c.toml").write_text(f"[optim]\nlr = {10**400}")
    with pytest.raises(ValueError, match="optim.lr is .*from 0 to 1"):
        check_values(load_config(["--config", str(tmp_path / "c.toml")]))
    for value in ("[a]", "</think>", '["a"', "[1]"):
        with pytest.raises(ValueError, match="rollout.stop is .* a list of strings in quotes|rollout.stop is 1"):
            load_config([f"--rollout.stop={value}"])


@pytest.mark.parametrize("key", ["model.path", "data.train", "data.test", "data.problem_column", "solution_column"])
def test_text_that_is_needed_is_not_empty(key):
    cls = SftConfig if key == "solution_column" else Config
    for value in ("", "  "):
        with pytest.raises(ValueError, match=f"{key} is empty"):
            check_values(load_config([f"--{key}={value}"], cls=cls))


@pytest.mark.parametrize("cls", [Config, SftConfig])
def test_an_output_that_is_a_file_is_refused(cls, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for path, why in (("file", "is a file"), ("file/below", "is a file"), ("nowhere", "is a broken link")):
        with pytest.raises(ValueError, match=f"output is {tmp_path}/{path} and {tmp_path}/{path.split('/')[0]} {why}"):
            check_values(load_config([f"--output={tmp_path / path}"], cls=cls))
    check_values(load_config([f"--output={tmp_path / 'new' / 'folder'}"], cls=cls))
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "new").exists()


MISTAKES = [
    (["--rollout.groupsize=4"], "did you mean rollout.group_size"),
    (["--lr=3"], "did you mean optim.lr"),
    (["--recipe=tony"], "No recipe named 'tony'"),
    (["--preset=x"], "No preset named 'x'"),
    (["--rollout.group_size=abc"], "rollout.group_size is 'abc': give a whole number from 1 to 1024"),
    (["--loss.mean=tok"], "loss.mean is 'tok': give one of response, token, constant"),
    (['--rollout.stop=[""]'], "rollout.stop is ['']"),
    (['--rollout.stop=["a", ""]'], "rollout.stop is ['a', '']"),
    (["--evaluate.temperature=0.001"], "evaluate.temperature is 0.001"),
    (["--reward.overlong_buffer=129"], "reward.overlong_buffer is 129 and rollout.max_tokens 128"),
    (["--data.train="], "data.train is empty"),
    (["--checkpoint_every=-1"], "checkpoint_every is -1: give a whole number from 0 to 1000000000 (0: never)"),
    (["--seed"], "--seed needs a value"),
    (["--rollout.problems=7"], "rollout.problems is 7"),
    (["--rollout.group_size=1"], "rollout.group_size is 1"),
    (["--rollout.group_size=2000"], "rollout.group_size is 2000"),
    (["--rollout.temperature=0"], "rollout.temperature is 0"),
    (["--steps=0"], "steps is 0"),
    (["--optim.updates=2", "--loss.old_logprobs=current"], "optim.updates is 2"),
    (["--loss.dual_clip=0.5"], "loss.dual_clip is 0.5"),
    (["--rollout.top_k=-1"], "rollout.top_k is -1"),
    (["--rollout.engine=vllm", "--rollout.tensor_parallel=3"], "rollout.tensor_parallel is 3, which does not divide 2"),
    (["--rollout.tensor_parallel=2"], "only vLLM supports"),
    (["--rollout.extra_problems=4"], "only vLLM supports"),
]


@pytest.mark.parametrize("args, says", MISTAKES, ids=[m[0][0] for m in MISTAKES])
def test_a_mistake_gets_one_sentence(args, says):
    with pytest.raises(ValueError) as e:
        check(load_config(args), 2)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_unknown_key_in_a_file(tmp_path):
    (tmp_path / "c.toml").write_text("[optim]\nlearning_rte = 1\n")
    with pytest.raises(ValueError, match="Unknown configuration key optim.learning_rte in c.toml"):
        load_config(["--config", str(tmp_path / "c.toml")])
    (tmp_path / "c.toml").write_text("[optim\n")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_config(["--config", str(tmp_path / "c.toml")])


MISTYPED = [
    (["lead_fast.train", "--rollout.groupsize=4"], "Unknown configuration key rollout.groupsize"),
    (["lead_fast.sft", "--optim.lrr=1"], "Unknown configuration key optim.lrr"),
    (["lead_fast.evaluate", "--rollout.groupsize=4"], "Unknown configuration key rollout.groupsize"),
    *(
        ([f"lead_fast.{command}", "--seed=-1", "--model=nowhere/at-all"], "seed is -1: give a whole number from 0")
        for command in ("train", "sft", "evaluate")
    ),
    *(
        ([f"lead_fast.{command}", f"--output={__file__}", "--model=nowhere/at-all"], f"output is {__file__} and")
        for command in ("train", "sft", "evaluate")
    ),
    (["lead_fast.plan", "--device=b300"], "--device is 'b300'"),
    (["lead_fast.report", "runs/nowhere"], "runs/nowhere has no metrics.jsonl"),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> list[list]:
    """Exit codes and output of a dry run and of commands with a mistake."""
    output = tmp_path_factory.mktemp("dry") / "run"
    dry = ["lead_fast.train", "--dry-run", f"--output={output}", "--rollout.group_size=4"]
    found = commands(dry, *(command for command, _ in MISTYPED))
    assert not output.exists()
    return found


def test_a_dry_run_names_what_was_chosen_and_stops(ended):
    code, out = ended[0]
    assert code == 0 and "group_size = 4" in out
    recipe, device, engine, attend, kernels = out.splitlines()[:5]
    assert recipe.startswith("Recipe tiny: no GPU") and "lead-14b" in recipe and "--recipe" in recipe
    assert device.startswith("Device: 1 CPU rank, ")
    assert engine.startswith("Rollouts: transformers ") and "scaled_dot_product_attention" in attend
    assert re.match(r"Kernels: (C\+\+ \(\w+\)|plain torch)", kernels)


@pytest.mark.parametrize("n", range(len(MISTYPED)), ids=[" ".join(command[:2]) for command, _ in MISTYPED])
def test_a_mistake_on_the_command_line_ends_every_command_with_that_sentence(n, ended):
    code, _ = ended[n + 1]
    assert code.startswith(f"error: {MISTYPED[n][1]}") and "\n" not in code


def test_none_is_a_value_where_a_key_has_it_and_absence_where_it_may_be_absent():
    c = load_config(["--advantage.std=none", "--loss.dual_clip=none", "--resume", "--parallel.reshard=false"])
    assert c.advantage.std == "none" and c.loss.dual_clip is None and c.resume and not c.parallel.reshard


# ------------------------------------------------------------------------------------------------------------- --help


@pytest.mark.parametrize("cls, args", [(Config, ["--recipe=lead-14b"]), (Config, ["--preset=official", "--steps=7"]),
                                       (SftConfig, ["--recipe=smollm2"])])  # fmt: skip
def test_help_lists_every_key_in_order_with_the_recipes_value_and_lists_nothing_else(cls, args, capsys):
    with pytest.raises(SystemExit) as e:
        load_config([*args, "--help"], cls=cls, about="What it does.")
    text = capsys.readouterr().out
    assert not e.value.code and text.startswith("What it does.\n")
    entries = re.findall(r"^  --(\S+?)=(.*)\n      (\S.*)$", text, re.M)  # a flag, and a line that describes it
    listed = {key: value for key, value, _ in entries if key not in ("config", "model")}
    assert list(listed) == keys(cls) and len(entries) == len(listed) + 2
    given = [f"--{key}={value}" for key, value in listed.items()]  # all are accepted and change nothing
    assert load_config(given, cls=cls) == load_config(args[:1], cls=cls)
    assert set(re.findall(r"^  --([a-z-]+)(?:\n|=[A-Z])", text, re.M)) == {"help", "dry-run", "config", "model"}
    sections = [f.name for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.type)]
    found = re.findall(r"^(\w+): (\S.*)$", text, re.M)
    assert [name for name, _ in found] == sections and not any("Config(" in said for _, said in found)


@pytest.mark.parametrize("module", ["train", "sft", "evaluate"])
def test_a_commands_help_is_its_docstring_and_the_keys(module):
    out = python("-m", f"lead_fast.{module}", "--help")
    assert out.returncode == 0, out.stderr[-2000:]
    assert f"-m lead_fast.{module} " in out.stdout.split("\n\n")[1] and "--recipe=tiny" in out.stdout
    assert "--data.train=arithmetic:train?n=" in out.stdout
    if module != "train":  # test_a_dry_run_names_what_was_chosen_and_stops
        dry = python("-m", f"lead_fast.{module}", "--dry-run", "--seed=5")
        assert dry.returncode == 0 and "\nseed = 5\n" in dry.stdout, dry.stderr[-2000:]
