"""Test the built-in engine: continuous batching samples what `generate` samples, and log-probs equal the trainer's."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from lead_fast.cli import load_config
from lead_fast.learner.model import load_tokenizer
from lead_fast.rollout.decoding import decodes
from lead_fast.rollout.engine import Sampling, Work
from lead_fast.rollout.transformers_engine import TransformersEngine
from lead_fast.runtime.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    config = load_config(["--recipe=tiny"], default_recipe="tiny")
    torch.set_num_threads(1)
    return TransformersEngine(config, load_tokenizer(config.model), ALONE)


def test_a_batch_size_of_0_is_all_of_an_engines_part_of_a_step(engine):
    args = ["--recipe=tiny", "--rollout.batch_size=0", "--rollout.problems=6", "--rollout.group_size=5"]
    config, two = load_config(args), Ranks(0, 2, torch.device("cpu"), None)  # type: ignore[arg-type]
    at_once = []

    class Watched(TransformersEngine):
        def _response(self, tokens, logprobs, s):
            at_once.append(len(tokens))
            return super()._response(tokens, logprobs, s)

    all_of_it = Watched(config, engine.tokenizer, two)
    assert all_of_it.batch_size == 15
    asked = prompts(engine, 6)
    all_of_it.generate(Work(asked, 5, [7] * 6, engines=2), Sampling(8))
    assert len(at_once) == 15  # half of the 30 responses, in one batch


def prompts(engine: TransformersEngine, n: int) -> list[list[int]]:
    """Make prompts of different lengths."""
    texts = [f"{a} + {b}" + " - 1" * (a % 4) for a, b in itertools.islice(itertools.product(range(2, 60), (3, 41)), n)]
    return [engine.tokenizer(t, add_special_tokens=False).input_ids for t in texts]


def responses(engine, asked, n, sampling, batch_size=128, seed=0):
    engine.batch_size = batch_size
    out = engine.generate(Work(asked, n, [seed + i for i in range(len(asked))]), sampling)
    assert sorted(out) == list(range(len(asked))) and all(len(rs) == n for rs in out.values())
    return out


def forced_logprobs(engine, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Compute log-probs of a response by one forward over prompt and response, [T, V]."""
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def far(statistic: float, freedom: int) -> bool:
    """Whether a chi-square statistic is beyond about its 0.9999 quantile."""
    return statistic > freedom + 4 * (2 * freedom) ** 0.5 + 4


def test_logprobs_are_those_of_one_forward_over_the_response(engine):
    asked = prompts(engine, 12)
    for temperature in (1.0, 0.7):
        out = responses(engine, asked, 4, Sampling(40, temperature), batch_size=16)
        for i, rs in out.items():
            for r in rs:
                expected = forced_logprobs(engine, asked[i], r.token_ids, temperature)
                expected = expected.gather(1, torch.tensor(r.token_ids)[:, None])[:, 0]
                error = (torch.tensor(r.logprobs) - expected).abs()
                assert error.mean() < 5e-6 and error.max() < 5e-5  # logits up to 30, rounded in float32
                assert r.finish_reason == ("stop" if r.token_ids[-1] in engine.eos_ids else "length")
                assert len(r.token_ids) <= 40 and not set(r.token_ids[:-1]) & set(engine.eos_ids)


def test_results_depend_neither_on_the_rank_nor_on_the_batch(engine):
    asked = prompts(engine, 10)
    together = responses(engine, asked, 4, Sampling(48), batch_size=40)
    for batch_size in (1, 4, 12):
        again = responses(engine, asked, 4, Sampling(48), batch_size)
        assert all([r.token_ids for r in again[i]] == [r.token_ids for r in together[i]] for i in together)
    alone = engine.generate(Work(asked[3:4], 4, [3]), Sampling(48))[0]
    assert [r.token_ids for r in alone] == [r.token_ids for r in together[3]]
    others = responses(engine, asked, 4, Sampling(48), seed=100)
    assert [r.token_ids for r in others[3]] != [r.token_ids for r in together[3]]


def test_greedy_is_the_likeliest_token_and_n_times_the_same(engine):
    asked = prompts(engine, 6)
    for i, rs in responses(engine, asked, 3, Sampling(32, temperature=0.0), batch_size=4).items():
        assert rs[0].token_ids == rs[1].token_ids == rs[2].token_ids
        likeliest = forced_logprobs(engine, asked[i], rs[0].token_ids).argmax(-1).tolist()
        assert rs[0].token_ids == likeliest


def test_first_tokens_follow_the_distribution(engine):
    asked = prompts(engine, 1)
    p = forced_logprobs(engine, asked[0], [0], 1.5).exp()[0].double().numpy()
    counts = np.zeros(len(p))
    for r in responses(engine, asked, 2000, Sampling(1, 1.5), batch_size=2000)[0]:
        counts[r.token_ids[0]] += 1
    often = p * 2000 >= 5
    seen, expected = np.append(counts[often], counts[~often].sum()), np.append(p[often], p[~often].sum()) * 2000
    assert len(seen) > 3
    assert not far(((seen - expected) ** 2 / expected).sum(), len(seen) - 1)
    uniform = np.full(len(seen), 2000 / len(seen))
    assert far(((seen - uniform) ** 2 / uniform).sum(), len(seen) - 1)  # shows that the test can fail


@pytest.mark.slow
def test_lengths_are_those_of_generate(engine, monkeypatch):
    asked = prompts(engine, 40)
    samples = []
    for continuous in (True, False):
        monkeypatch.setattr(engine, "continuous", continuous)
        out = responses(engine, asked, 25, Sampling(64), batch_size=250)
        samples.append([len(r.token_ids) for rs in out.values() for r in rs])
    edges = np.quantile(samples[1], np.linspace(0, 1, 9)[1:-1])
    one, two = (np.bincount(np.searchsorted(edges, lengths), minlength=8) for lengths in samples)
    filled = one + two > 0
    assert filled.sum() > 3
    assert not far(((one - two)[filled] ** 2 / (one + two)[filled]).sum(), int(filled.sum()) - 1)


def test_dropped_tokens_are_never_sampled_and_logprobs_are_those_sampled_from(engine):
    asked = prompts(engine, 8)
    for s in (Sampling(16, 1.2, top_k=1), Sampling(16, 1.2, top_p=1e-6), Sampling(16, 1.2, min_p=1.0)):
        for rs in responses(engine, asked, 2, s).values():
            assert rs[0].token_ids == rs[1].token_ids and max(map(abs, rs[0].logprobs)) < 1e-6
    two = responses(engine, asked, 8, Sampling(4, 5.0, top_k=2))
    for i, rs in two.items():
        best = forced_logprobs(engine, asked[i], [0]).topk(2).indices[0].tolist()
        assert {r.token_ids[0] for r in rs} <= set(best)
        chances = {r.token_ids[0]: np.exp(r.logprobs[0]) for r in rs}
        assert len(chances) < 2 or abs(sum(chances.values()) - 1) < 1e-5  # of the two tokens left after dropping


def test_stop_strings_end_a_response_and_stay_in_it(engine):
    asked = prompts(engine, 8)
    free = responses(engine, asked, 2, Sampling(48))
    word = next(t for t in (engine.tokenizer.decode([t]) for t in free[0][0].token_ids[2:]) if t.strip())
    for i, rs in responses(engine, asked, 2, Sampling(48, stop=(word,))).items():
        for r, whole in zip(rs, free[i], strict=True):
            assert r.token_ids == whole.token_ids[: len(r.token_ids)]
            text = engine.tokenizer.decode(r.token_ids[-16:])
            assert word in text or r.token_ids == whole.token_ids


def test_a_model_with_grouped_heads_and_a_full_batch(tmp_path, engine):
    shape = dict(vocab_size=len(engine.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
    torch.manual_seed(0)
    other = replace_model(engine, LlamaConfig(**shape))
    asked = prompts(engine, 5)
    for i, rs in responses(other, asked, 3, Sampling(70), batch_size=7).items():
        for r in rs:
            expected = forced_logprobs(other, asked[i], r.token_ids).gather(1, torch.tensor(r.token_ids)[:, None])[:, 0]
            assert (torch.tensor(r.logprobs) - expected).abs().max() < 1e-5
    assert decodes(LlamaConfig(**shape)) and not decodes(MistralConfig(**shape, sliding_window=16))


def replace_model(engine: TransformersEngine, shape) -> TransformersEngine:
    other = TransformersEngine.__new__(TransformersEngine)
    other.__dict__.update(engine.__dict__)
    other.model = AutoModelForCausalLM.from_config(shape).eval()
    return other
