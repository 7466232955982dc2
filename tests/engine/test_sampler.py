"""The sampler against a full forward pass, one prompt at a time, and naive top-k and top-p."""

from __future__ import annotations

import pytest
import torch
from decoder_cases import build

from rlcore.engine.sampler import draw, sample, truncate
from rlcore.engine.seeding import generator

PROMPTS = ["State: 1 + 2 =\n", "State: 10 + 22 =\n", "Something else\n", "7"]


def encoded(tokenizer, texts=PROMPTS):
    return tokenizer(texts)["input_ids"]


def run(small, prompts=None, samples=3, seed=0, length=6, **options):
    model, tokenizer, _ = small
    prompts = encoded(tokenizer) if prompts is None else prompts
    options = {"eos_id": tokenizer.eos_token_id, "pad_id": 0, "max_new_tokens": length, **options}
    return prompts, sample(model, prompts, samples, generator=generator(seed), **options)


def full_forward(model, prompt, answer, temperature=1.0):
    """Log-probs of an answer's tokens from one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_agrees_with_a_full_forward(small, temperature):
    prompts, out = run(small, temperature=temperature)
    for row in range(len(out.lengths)):
        length = int(out.lengths[row])
        answer = out.ids[row, :length].tolist()
        expected = full_forward(small[0], prompts[row // 3], answer, temperature)
        expected = expected.gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(out.model_logp[row, :length], expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(out.behaviour_logp[row, :length], expected, atol=2e-5, rtol=0)
        assert not out.behaviour_logp[row, length:].any()


@pytest.mark.parametrize("name", ["Mistral", "Gemma2", "Gemma3", "GptOss"])
def test_windows_are_those_of_a_full_forward(name):
    """Prompts that begin alike and have different lengths, all beyond a window of four tokens."""
    model = build(name, initializer_range=0.1).eval()
    prompts = [[5, 6, 7, 8, 9, 10], [5, 6, 7], [5, 6, 12, 13], [5, 6, 21, 22, 23, 24, 25, 26, 27, 28]]
    out = sample(model, prompts, 2, max_new_tokens=8, eos_id=2, pad_id=0, generator=generator(0))
    for row, length in enumerate(out.lengths.tolist()):
        answer = out.ids[row, :length].tolist()
        expected = full_forward(model, prompts[row // 2], answer).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(out.model_logp[row, :length], expected, atol=2e-5, rtol=0)


def test_same_seed_same_answers(small):
    _, a = run(small, seed=1)
    _, b = run(small, seed=1)
    _, c = run(small, seed=2)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.ids, c.ids)


def test_global_random_state_is_neither_read_nor_changed(small):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _, a = run(small)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert torch.equal(a.ids, run(small)[1].ids)


def test_prefill_once_equals_separate_prompts(small):
    """Groups, padding and the shared beginning change nothing: each answer is the one drawn for its prompt alone."""
    tokenizer = small[1]
    texts = ["The same start: 1 =\n", "The same start: 12345 =\n", "The same start: 33 =\n"]
    prompts, out = run(small, encoded(tokenizer, texts), samples=4, seed=3)
    table = torch.rand(12, 6, generator=generator(3))
    original = torch.rand
    for p, prompt in enumerate(prompts):
        for copy in range(4):
            row = 4 * p + copy
            try:
                torch.rand = lambda *a, row=row, **k: table[row : row + 1]
                _, alone = run(small, [prompt], samples=1)
            finally:
                torch.rand = original
            assert torch.equal(alone.ids[0], out.ids[row])
            torch.testing.assert_close(alone.model_logp[0], out.model_logp[row], atol=2e-5, rtol=0)


def test_prompt_is_prefilled_once_for_its_group(small):
    model, tokenizer, _ = small
    shapes = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape)),
        with_kwargs=True,
    )
    try:
        run(small, encoded(tokenizer, ["Shared: 1\n", "Shared: 2\n"]), samples=5, length=2)
    finally:
        hook.remove()
    common = len("Shared: ")
    assert shapes[0] == (1, common)
    assert shapes[1] == (2, 2)
    assert shapes[2][0] <= 10 and shapes[2][1] == 1


def test_ends_at_the_end_token(small):
    _, out = run(small, samples=64, length=12, temperature=3.0)
    eos = small[1].eos_token_id
    ended = 0
    for row, length in enumerate(out.lengths.tolist()):
        answer = out.ids[row, :length].tolist()
        assert eos not in answer[:-1]
        assert answer[-1] == eos or length == 12
        assert (out.ids[row, length:] == 0).all()
        ended += answer[-1] == eos
    assert ended > 10


def test_finished_rows_leave_the_batch(small):
    model, _, _ = small
    rows = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((args[0] if args else kwargs["input_ids"]).shape[0]), with_kwargs=True
    )
    try:
        _, out = run(small, samples=64, length=12, temperature=3.0)
    finally:
        hook.remove()
    steps = rows[-11:]
    assert steps == [int((out.lengths > t + 1).sum()) for t in range(11)]


def naive_kept(logp, top_k, top_p):
    """The tokens that survive, by sorting Python lists: top-k, then the fewest that hold top_p of what is left."""
    order = sorted(range(len(logp)), key=lambda v: (-logp[v], v))
    if top_k:
        order = order[:top_k]
    total = sum(2.718281828459045 ** logp[v] for v in order)
    kept, mass = [], 0.0
    for v in order:
        if mass >= top_p * total and kept:
            break
        kept.append(v)
        mass += 2.718281828459045 ** logp[v]
    return set(kept if top_p < 1 else order)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (0, 0.5), (0, 0.9), (5, 0.7), (100, 0.01), (4, 1.0)])
def test_truncation_against_naive(top_k, top_p):
    logp = (3 * torch.randn(50, 17, generator=generator("x"))).log_softmax(-1)
    kept = truncate(logp, top_k, top_p) > -torch.inf
    for row in range(50):
        assert set(kept[row].nonzero().flatten().tolist()) == naive_kept(logp[row].tolist(), top_k, top_p)


def test_ties_at_the_border_go_to_the_lower_id():
    kept = truncate(torch.zeros(1, 6).log_softmax(-1), 2, 1.0) > -torch.inf
    assert kept.tolist() == [[True, True, False, False, False, False]]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6)])
def test_drawn_frequencies(top_k, top_p):
    """Each token is drawn as often as its renormalised probability says, within five standard deviations."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    n = 40000
    token, logp, full = draw(logits.expand(n, -1), torch.rand(n, generator=generator(1)), 0.8, top_k, top_p)
    expected = truncate((logits / 0.8).log_softmax(-1)[None], top_k, top_p).softmax(-1)[0]
    count = torch.bincount(token, minlength=5) / n
    assert ((count - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()
    torch.testing.assert_close(logp, expected.log()[token], atol=1e-5, rtol=0)
    torch.testing.assert_close(full, (logits / 0.8).log_softmax(-1)[token], atol=1e-5, rtol=0)


def test_uniform_at_its_ends_never_draws_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf]]).expand(3, -1)
    token, _, _ = draw(logits, torch.tensor([0.0, 1 - 2**-24, 0.999999]), 1.0, 0, 1.0)
    assert token.tolist() == [1, 2, 2]


def test_truncated_sampling_reports_both_log_probs(small):
    prompts, out = run(small, top_k=2, samples=8)
    for row in range(0, len(out.lengths), 5):
        length = int(out.lengths[row])
        answer = out.ids[row, :length].tolist()
        logp = full_forward(small[0], prompts[row // 8], answer)
        for t, token in enumerate(answer):
            best = logp[t].topk(2)
            assert token in best.indices.tolist()
            assert abs(float(out.behaviour_logp[row, t] - (logp[t, token] - best.values.logsumexp(0)))) < 3e-5
            assert abs(float(out.model_logp[row, t] - logp[t, token])) < 3e-5


def test_an_empty_prompt_is_named(small):
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected at least one token, got none"):
        run(small, [[5], [], [6]])


def test_refuses_depths_at_which_rows_depend_on_each_other():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build("Llama", rope_parameters=rope, max_position_embeddings=12).eval()
    options = {"eos_id": 2, "pad_id": 0, "generator": generator(0)}
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected at most 12 tokens .*, got 7 \+ 6: .* rotary"):
        sample(model, [[5], [5] * 7], 2, max_new_tokens=6, **options)
    out = sample(model, [[5], [5] * 7], 2, max_new_tokens=5, **options)
    for row, length in enumerate(out.lengths.tolist()):
        answer = out.ids[row, :length].tolist()
        expected = full_forward(model, [[5], [5] * 7][row // 2], answer).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(out.model_logp[row, :length], expected, atol=2e-5, rtol=0)
