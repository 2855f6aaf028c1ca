"""Test examples and quotations in docs: the engine of docs/howto/own-engine.md runs, quoted messages exist."""

import re
import shlex

import pytest
from jobs import ROOT, python, records, succeeded

from lead_fast.cli import load_config
from lead_fast.config import Config, SftConfig
from lead_fast.learner.model import load_tokenizer
from lead_fast.learner.policy import load_policy
from lead_fast.rollout.sync import canary, publish

DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.glob("*.md")),
    *sorted((DOCS / "howto").glob("*.md")),
]
ENGINE = re.findall(
    r"^```python\n(.*?)^```", (DOCS / "howto" / "own-engine.md").read_text(encoding="utf-8"), re.M | re.S
)
MESSAGE = re.compile(r"^\| `([^`]+)` \|", re.M)


def test_the_engine_of_the_page_trains(tmp_path):
    (tmp_path / "my-engine.py").write_text(ENGINE[0])
    keys = ["--steps=2", "--rollout.problems=2", "--rollout.group_size=2", "--rollout.max_tokens=24",
            "--evaluate.every=0", "--metrics.keep_rollouts=0", f"--output={tmp_path / 'run'}"]  # fmt: skip
    succeeded(python(str(tmp_path / "my-engine.py"), *keys))
    steps = records(tmp_path / "run", "train")
    assert [r["step"] for r in steps] == [1, 2] and all(r["response_tokens"] > 0 for r in steps)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_an_engine_that_ignores_the_temperature_is_refused(single_rank):
    c = load_config(["--rollout.temperature=0.7", "--rollout.engine=transformers"])
    names: dict = {"__name__": "engine"}
    exec(ENGINE[0].replace("sampling.temperature or 1.0", "1.0"), names)
    policy, engine = (
        load_policy(c.model, c.parallel, single_rank),
        names["PlainEngine"](c, load_tokenizer(c.model), single_rank),
    )
    publish(policy, engine, 0, c, single_rank)
    assert engine.version == 0
    prompt = engine.tokenizer.encode("Compute 3+4.")
    with pytest.raises(ValueError, match="At the first sync log-probs .* it reports them before the temperature"):
        canary(policy, engine, prompt, c, single_rank)


def squeezed(text: str) -> str:
    """Text as a reader sees it: adjacent string literals are joined, and white space is a single blank."""
    return re.sub(r"\s+", " ", re.sub(r"""["']\s*\n\s*(?:rf|fr|f|r)?["']""", "", text))


@pytest.mark.quick
def test_every_message_that_troubleshooting_quotes_is_in_the_code():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = MESSAGE.findall(page)
    files = [p for top in ("lead_fast", "kernels") for p in (ROOT / top).rglob("*.py")]
    code = " ".join(squeezed(p.read_text(encoding="utf-8")) for p in files)
    fragments = [part.strip() for message in quoted for part in message.split("...") if part.strip()]
    missing = [f for f in fragments if squeezed(f) not in code]
    assert len(quoted) > 40 and not missing, f"docs/troubleshooting.md quotes what no file says: {missing}"
    assert all(max(map(len, message.split("..."))) > 8 for message in quoted)


@pytest.mark.quick
def test_every_test_that_a_page_names_exists():
    there = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        there |= {path.stem, *re.findall(r"^\s*def (test_\w+)\(", path.read_text(encoding="utf-8"), re.M)}
    for page in PAGES:
        named = set(re.findall(r"\b(test_\w+)\b", page.read_text(encoding="utf-8")))
        assert named <= there, f"{page.name} names {named - there}"


@pytest.mark.quick
def test_the_example_of_the_concepts_page_prints_what_it_says(capsys):
    page = (DOCS / "concepts.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```\n\n(prints .*)$", page, re.M | re.S)
    exec(example[0], {})
    printed = re.findall(r"-?\d\.\d{4}", capsys.readouterr().out)
    assert printed == [*re.findall(r"-?\d\.\d{4}", example[1]), *printed[-3:]] and len(printed) == 8


OTHERS = ("--compare", "--tables", "--lighteval", "--help", "[")  # commands without a configuration, and patterns


@pytest.mark.quick
def test_every_command_of_the_pages_has_a_configuration():
    loaded = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for module, rest in re.findall(
            r"^ *(?:torchrun|python).*? -m lead_fast\.(train|sft|evaluate)\b(.*)$", text, re.M
        ):
            args = shlex.split(re.sub(r"\$\{?\w+[^ }]*\}?", "x", rest), comments=True)
            if any(a.startswith(OTHERS) for a in args):
                continue
            args = [a for a in args if a not in ("--dry-run", "--allow_code")]
            load_config(args, cls=SftConfig if module == "sft" else Config)
            loaded += 1
    assert loaded >= 20
