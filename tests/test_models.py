"""Test that models train as transformers computes them, or are refused in one sentence before weights are loaded."""

import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, check, errors
from jobs import ROOT, commands, succeeded, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

from lead_fast.cli import dump, load_config
from lead_fast.config import ModelConfig, SftConfig
from lead_fast.data.prompts import tokenize_prompts
from lead_fast.learner import attention, checkpoint, head, model_check
from lead_fast.learner.attention import Attention, Features, varlen_attention
from lead_fast.learner.head import HeadForm, probe_head
from lead_fast.learner.loss import pack_logprobs, rounding_limit
from lead_fast.learner.model import EMBEDDED, load_model, load_tokenizer
from lead_fast.learner.model_check import CPU, build, check_model, pack_of, sequences_of
from lead_fast.learner.policy import Policy, load_policy
from lead_fast.records import Problem
from lead_fast.rollout import transformers_engine
from lead_fast.rollout.engine import visible_text
from lead_fast.rollout.transformers_engine import check_generation
from lead_fast.sft import check_sft, trains_named_model

EXACT = 1e-5  # relative, in float32

# ------------------------------------------------------------------------------------------------------------ families


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if f.quick else pytest.mark.slow) for n, f in FAMILIES.items()]
)
def test_a_family_trains_as_transformers_computes_it_or_is_refused(name: str):
    family = FAMILIES[name]
    sentence = check(family)
    if family.refused:
        assert re.search(family.refused, sentence) and sentence.startswith(f"Model type {family.model_type} (DIR) ")
        assert "\n" not in sentence and sentence.endswith(".")
    else:
        assert not sentence, sentence
        for what, error in errors(family).items():
            assert error < EXACT, f"{what}: {error}"


def test_the_table_in_the_documents_has_every_family():
    rows = re.findall(r"^\| (.+?) \| (applied|refused) \|", (ROOT / "docs" / "models.md").read_text(), re.M)
    assert dict(rows) == {name: "refused" if f.refused else "applied" for name, f in FAMILIES.items()}


def test_the_embedded_model_and_the_recipes_shapes_are_checked_within_seconds():
    big = {"hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
           "intermediate_size": 13824, "vocab_size": 152064, "pad_token_id": None}  # Qwen2.5-14B  # fmt: skip
    shape = dataclasses.replace(FAMILIES["qwen2"], more=big).config()
    began = time.monotonic()
    check_model(shape, ModelConfig(), CPU, 14336)
    assert time.monotonic() - began < 10


def without(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Leave out features of attention."""
    given = {"window", "softcap", "sinks"} - {name}

    def ours(window: Any, softcap: Any, sinks: Any) -> Features:
        every = {"window": window, "softcap": softcap, "sinks": sinks}
        return Features(**{k: every[k] for k in given})

    return lambda monkeypatch: monkeypatch.setattr(attention, "Features", ours)


def bare_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what is done to logits."""
    monkeypatch.setattr(model_check, "Policy", lambda model: Policy(model, head_form=HeadForm()))


MUTATIONS = {
    "window": ("mistral, window", without("window"), "sliding_window = 16"),
    "attention's cap": ("gemma2, attention cap", without("softcap"), "attn_logit_softcapping = 2"),
    "sinks": ("gpt_oss, sinks", without("sinks"), "its attention is computed differently"),
    "scale": ("granite", bare_logits, "its logits are computed differently.*logits_scaling = 8"),
    "cap": ("gemma2", bare_logits, "its logits are computed differently.*final_logit_softcapping = 30"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_the_trainer_would_leave_out_is_found_and_named(name: str, monkeypatch):
    family, leave_out, says = MUTATIONS[name]
    leave_out(monkeypatch)
    assert re.search(says, check(FAMILIES[family]))


def test_a_span_that_no_sequence_reaches_does_not_refuse_a_model():
    family = FAMILIES["phi3, longrope"]
    rope = family.more["rope_parameters"] | {"original_max_position_embeddings": 4096}
    more = family.more | {"rope_parameters": rope, "original_max_position_embeddings": 4096}
    shape = dataclasses.replace(family, more=more).config()
    check_model(shape, ModelConfig(), CPU, 4096)
    with pytest.raises(ValueError, match="rope_parameters = longrope"):
        check_model(shape, ModelConfig(), CPU, 4097)


def test_a_type_that_cannot_be_reduced_is_trained_only_where_that_is_asked_for(monkeypatch):
    def fail(*_: Any) -> Any:
        raise model_check.NotReducible("it is made of one piece")

    monkeypatch.setattr(model_check, "small_copy", fail)
    shape = FAMILIES["llama"].config()
    with pytest.raises(ValueError, match="no small copy of it can be made .it is made of one piece.*--model.unchecked"):
        check_model(shape, ModelConfig(), CPU, None)
    check_model(shape, ModelConfig(unchecked=True), CPU, None)


def test_layers_of_each_kind_remain_in_the_small_copy():
    layers = ["sliding_attention"] * 5 + ["full_attention"]
    shape = FAMILIES["gemma3_text"]
    shape = dataclasses.replace(shape, more=shape.more | {"num_hidden_layers": 12, "layer_types": layers * 2}).config()
    small = model_check.small_copy(shape, False, None).config
    assert small.layer_types == ["sliding_attention", "full_attention"] and small.sliding_window == 16
    periodic = FAMILIES["jamba"]
    more = periodic.more | {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2}
    small = model_check.small_copy(dataclasses.replace(periodic, more=more).config(), False, None)
    kinds = [type(layer).__name__ for layer in small.model.layers]
    assert len(set(kinds)) == 2 and len(kinds) < 8


# ---------------------------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize("name, form", [
    ("llama", HeadForm()), ("granite", HeadForm(1 / 8)), ("hyperclovax", HeadForm(0.25)), ("cohere", HeadForm(0.0625)),
    ("gemma2", HeadForm(1.0, 30.0)), ("minicpm3", HeadForm(1 / 4)), ("falcon_h1", HeadForm(0.5)),
])  # fmt: skip
def test_the_probe_finds_scale_and_cap_and_leaves_the_model_as_it_was(name, form):
    model = build(FAMILIES[name].config(), False)
    own, names = model.lm_head, [n for n, _ in model.named_parameters()]
    state = torch.random.get_rng_state()
    assert probe_head(model) == form
    assert (
        model.lm_head is own and "forward" not in vars(model.model) and torch.equal(state, torch.random.get_rng_state())
    )
    assert [n for n, _ in model.named_parameters()] == names


def test_logits_that_are_anything_else_are_refused_with_the_keys():
    model = build(FAMILIES["granite"].config(), False)
    forward = model.forward

    def other(*args: Any, **kw: Any) -> Any:
        out = forward(*args, **kw)
        out.logits = out.logits.sign() * out.logits.abs().sqrt()
        return out

    model.forward = other
    with pytest.raises(ValueError, match="not its head's product.*logits_scaling = 8"):
        head.probe_head(model)


# ----------------------------------------------------------------------------------------------------------- attention


def test_windows_caps_and_head_dims_reach_the_gpus_implementations():
    calls = []

    def flash(**kw: Any) -> torch.Tensor:
        calls.append(kw)
        return kw["q"]

    def with_cap(*, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
                 softcap=0.0):  # fmt: skip
        return flash(**locals() | {"flash": None})

    q, v = torch.zeros(60, 4, 24), torch.ones(60, 2, 16)
    cu = torch.tensor([0, 20, 60], dtype=torch.int32)
    fa2 = Attention("flash-attn, FA2", with_cap)
    for window, given in ((16, (15, 0)), (40, (-1, -1)), (None, (-1, -1))):
        out = varlen_attention(q, q[:, :2], v, cu, 40, None, fa2, Features(window, 50.0))
        assert calls[-1]["window_size"] == given and calls[-1]["softcap"] == 50.0 and calls[-1]["causal"]
        assert out.shape == (60, 4, 16) and calls[-1]["v"].shape[-1] == 24 and calls[-1]["softmax_scale"] == 24**-0.5
    old = Attention("flash-attn, FA2 (2.5)", lambda *, q: q)
    for who in (old, Attention("torch's varlen_attn")):
        with pytest.raises(ValueError, match="attn_logit_softcapping.*install flash-attn"):
            varlen_attention(q, q, v, cu, 40, None, who, Features(softcap=50.0))
    with pytest.raises(ValueError, match="sinks"):
        varlen_attention(q, q, v, cu, 40, None, fa2, Features(sinks=torch.zeros(4)))


def test_torchs_operator_is_given_the_window(monkeypatch):
    from torch.nn.attention import varlen

    calls = []
    real = varlen.varlen_attn
    monkeypatch.setattr(attention, "varlen_takes_gqa", lambda: True)
    monkeypatch.setattr(varlen, "varlen_attn", lambda **kw: calls.append(kw) or kw["query"])
    x, cu = torch.zeros(60, 4, 16), torch.tensor([0, 60], dtype=torch.int32)
    for window, given in ((16, (15, 0)), (60, (-1, 0)), (None, (-1, 0))):
        varlen_attention(x, x, x, cu, 60, None, Attention("torch's varlen_attn"), Features(window))
        assert calls[-1]["window_size"] == given and "window_size" in (real.__kwdefaults__ or {})


# -------------------------------------------------------------------------------------------------------------- engine


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt_oss, sinks", "lfm2"])
def test_the_built_in_engine_samples_as_transformers_computes(name: str):
    check_generation(FAMILIES[name].config(), ModelConfig(path="DIR"), None)


def test_an_engine_that_leaves_out_a_soft_cap_is_refused(monkeypatch):
    monkeypatch.setattr(transformers_engine, "attention_of", lambda shape: {})
    with pytest.raises(ValueError, match=r"Model type gemma2 \(DIR\) is sampled differently.*--rollout.engine=vllm"):
        check_generation(FAMILIES["gemma2, attention cap"].config(), ModelConfig(path="DIR"), None)


def test_rounding_alone_explains_what_bfloat16_changes_and_not_another_temperature(single_rank):
    half, full = load_config(["--model.dtype=bfloat16"]), load_config([])
    policies = {c.model.dtype: Policy(load_model(c.model, getattr(torch, c.model.dtype))) for c in (half, full)}
    pack = pack_of(sequences_of(0))
    exact, rounded = (pack_logprobs(policies[d], pack, 1.0) for d in ("float32", "bfloat16"))
    limit = {c.model.dtype: rounding_limit(policies[c.model.dtype], pack, c, single_rank) for c in (half, full)}
    assert (exact - rounded).abs().mean() < limit["bfloat16"]
    assert limit["float32"] < 1e-3 * limit["bfloat16"]
    assert (pack_logprobs(policies["float32"], pack, 1.2) - exact).abs().mean() > 100 * limit["float32"]
    assert (pack_logprobs(policies["bfloat16"], pack, 2.0) - rounded).abs().mean() > limit["bfloat16"]


# ----------------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy the embedded model's files."""
    for file in EMBEDDED["tiny"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def set_keys(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_tokenizer_that_cannot_work_gets_one_sentence(folder, capsys):
    config = ModelConfig(path=str(folder))
    set_keys(folder / "tokenizer_config.json", pad_token=None)
    assert load_tokenizer(config).pad_token_id == load_tokenizer(config).eos_token_id
    assert "has no padding token: its end-of-sequence token is used instead" in capsys.readouterr().out
    set_keys(folder / "config.json", vocab_size=400)
    with pytest.raises(ValueError, match=r"with id 438, but the model's embedding has only 400 rows"):
        load_tokenizer(config)
    set_keys(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match="no end-of-sequence token.*tokenizer_config.json"):
        load_tokenizer(config)


def test_special_tokens_stay_visible_to_grading_and_ends_and_padding_do_not():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["tiny"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer("1+1</think>2", add_special_tokens=False)["input_ids"]
    assert "</think>" not in tokenizer.decode(ids, skip_special_tokens=True)  # what grading saw
    text = visible_text(tokenizer, [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], [tokenizer.eos_token_id])
    assert text == "1+1</think>2"


def test_arguments_reach_the_chat_template_and_an_unknown_one_is_refused(tmp_path):
    c = load_config(["--data.template.enable_thinking=false", "--data.template.effort", "high", "--data.template.n=3"])
    assert c.data.template == {"enable_thinking": False, "effort": "high", "n": 3}
    (tmp_path / "c.toml").write_text(dump(c))
    assert load_config(["--config", str(tmp_path / "c.toml")]).data.template == c.data.template
    (tmp_path / "d.toml").write_text("[data.template]\nenable_thinking = true\n")
    args = ["--config", str(tmp_path / "d.toml"), "--data.template.enable_thinking=false"]
    assert load_config(args).data.template == {"enable_thinking": False}
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["tiny"])
    tokenizer.chat_template = "{{ messages[0].content }}{% if not enable_thinking %}<think></think>{% endif %}"
    problem = [Problem("1", "2+2", "4")]

    def prompt(template: dict[str, Any]) -> str:
        _, (ids,) = tokenize_prompts(problem, tokenizer, instruction="", max_prompt_tokens=99, template=template)
        return tokenizer.decode(ids)

    assert prompt({"enable_thinking": False}).endswith("<think></think>")
    assert not prompt({"enable_thinking": True}).endswith("<think></think>")
    with pytest.raises(ValueError, match="data.template.thinking is given.*no thinking"):
        prompt({"thinking": True})


# ----------------------------------------------------------------------------------------------------- SFT and exports


def test_sft_trains_the_model_that_is_named(folder):
    for flag in ("--model", "--model.path"):
        args = [f"{flag}={folder}"]
        c = load_config([*trains_named_model(args), *args], cls=SftConfig)
        assert not c.from_scratch and c.model.path == str(folder)
        check_sft(c)
    assert load_config(trains_named_model([]), cls=SftConfig).from_scratch
    contradiction = ["--from_scratch", "--model", str(folder)]
    with pytest.raises(ValueError, match="from_scratch is true and model.path"):
        check_sft(load_config([*trains_named_model(contradiction), *contradiction], cls=SftConfig))


def test_sft_of_a_folder_begins_with_its_weights_and_refuses_what_it_cannot_train(folder, tmp_path):
    run = tmp_path / "run"
    args = [
        "lead_fast.sft",
        f"--model={folder}",
        "--steps=1",
        "--batch_tokens=64",
        "--optim.lr=0",
        "--optim.warmup_steps=0",
    ]
    args += ["--data.train=arithmetic:train?n=8", "--data.test=arithmetic:test?n=4", "--export_dtype=bfloat16"]
    set_keys(folder / "config.json", sliding_window=16, use_sliding_window=True, layer_types=["sliding_attention"] * 4)
    (trained,) = commands([*args, f"--output={run}"])
    assert trained[0] == 0, trained
    ours, given = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (run / "final", folder))
    assert ours.config.sliding_window == 16
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), given.parameters(), strict=True))
    refused = FAMILIES["lfm2"].config()
    refused.vocab_size = 439
    refused.save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # the message comes before weights are read
    (sft, train) = commands(
        [*args, f"--output={tmp_path / 'a'}"], ["lead_fast.train", f"--model={folder}", "--steps=1"]
    )
    for code, _ in (sft, train):
        assert "Model type lfm2" in code and "layer_types has conv" in code
    assert not (tmp_path / "a").exists()


def test_a_head_that_differs_from_a_tied_embedding_survives_export(folder, tmp_path, single_rank):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights["lm_head.weight"] = weights["lm_head.weight"] * 0.5
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    c = load_config([f"--model={folder}"])
    policy = load_policy(c.model, c.parallel, single_rank)
    checkpoint.export(tmp_path / "final", policy, load_tokenizer(c.model), torch.float32, single_rank)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(again.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert not again.config.tie_word_embeddings


def test_a_tied_head_stays_tied_in_an_export(folder, tmp_path, single_rank):
    c = load_config([f"--model={folder}"])
    policy = load_policy(c.model, c.parallel, single_rank)
    checkpoint.export(tmp_path / "final", policy, load_tokenizer(c.model), torch.float32, single_rank)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    assert again.config.tie_word_embeddings and again.lm_head.weight is again.model.embed_tokens.weight


# -------------------------------------------------------------------------------------------------------------- ranks

SHARED = """
import sys, torch, torch.distributed as dist
from families import FAMILIES
from lead_fast.config import ParallelConfig
from lead_fast.learner.model_check import build, pack_of, randomize, sequences_of
from lead_fast.learner.packing import make_pack
from lead_fast.learner.policy import Policy
from lead_fast.runtime.ranks import start, stop
from lead_fast.sft import pack_loss

ranks = start(ParallelConfig(sequence=2))
worst = 0.0
for name in ("gpt_oss, sinks", "gemma2", "mistral, window"):
    torch.manual_seed(0)
    model = build(FAMILIES[name].config(), False).eval()
    randomize(model, 0)
    sequences, grads = sequences_of(0), []
    split = range(len(sequences)), [s[:1] for s in sequences], [s[1:] for s in sequences], None, ranks.device
    for group, part in ((None, (0, 1)), (ranks.sequence_group, (ranks.member, 2))):
        model.zero_grad()
        pack_loss(Policy(model, sequence_group=group), make_pack(*split, part), 100).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    dist.all_reduce(grads[1])
    worst = max(worst, ((grads[0] - grads[1]).norm() / grads[0].norm()).item())
if ranks.main:
    print("worst", worst)
stop()
"""


def test_windows_caps_and_sinks_have_the_same_gradient_on_ranks_that_share_a_pack(tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    out = succeeded(torchrun(2, str(tmp_path / "shared.py"))).stdout
    assert float(out.split("worst ")[1].split()[0]) < EXACT
