"""Log-probs and entropies through the output head equal those of the whole logits, whatever the chunk."""

from __future__ import annotations

import pytest
import torch

from opd.maths.entropy import token_entropy
from opd.maths.head import OutputHead, through_head, token_scores

VOCAB, HIDDEN, ROWS = 11, 5, 7


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB + 2, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)  # 2 padded
    ids = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return hidden, weight, ids


def plain(hidden, weight, ids, temperature):
    logprobs = (hidden @ weight[:VOCAB].t() / temperature).log_softmax(-1)
    return logprobs.gather(1, ids[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_whole_logits(case, chunk, temperature):
    hidden, weight, ids = case
    head = OutputHead(weight_VH=weight, vocab_size=VOCAB)
    got = token_scores(hidden, head, ids, temperatures=[temperature, 1.0], with_entropy=True, chunk=chunk)
    logprobs, entropy = plain(hidden, weight, ids, temperature)
    want = (logprobs, plain(hidden, weight, ids, 1.0)[0], entropy)
    scales = [torch.linspace(0.5, 2, ROWS, dtype=torch.float64) * k for k in (1, -2, 3)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    got_grads = torch.autograd.grad(sum((a * s).sum() for a, s in zip(got, scales, strict=True)), (hidden, weight))
    want_grads = torch.autograd.grad(sum((b * s).sum() for b, s in zip(want, scales, strict=True)), (hidden, weight))
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_no_rows_still_reach_hidden_states_and_weight(case):
    hidden, weight, ids = case
    head = OutputHead(weight_VH=weight, vocab_size=VOCAB)
    logprobs, entropy = token_scores(hidden[:0], head, ids[:0], temperatures=[1.0], with_entropy=True, chunk=4)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.count_nonzero() == 0 and weight.grad.count_nonzero() == 0


def test_a_frozen_head_gets_no_gradient(case):
    hidden, weight, ids = case
    head = OutputHead(weight_VH=weight.detach(), vocab_size=VOCAB)
    (logprobs,) = token_scores(hidden, head, ids, temperatures=[1.0], chunk=4)
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    (want,) = torch.autograd.grad(plain(hidden, weight, ids, 1.0)[0].sum(), hidden)
    torch.testing.assert_close(grad, want, rtol=0, atol=1e-12)


def test_low_precision_logits_are_scored_in_fp32(case):
    hidden, weight, ids = case
    head = OutputHead(weight_VH=weight.detach().bfloat16(), vocab_size=VOCAB)
    (logprobs,) = token_scores(hidden.detach().float(), head, ids, temperatures=[1.0], chunk=4)
    want = (hidden.bfloat16() @ weight[:VOCAB].bfloat16().t()).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, want.detach(), rtol=0, atol=1e-5)


def test_logits_exist_for_one_chunk_at_a_time(case):
    hidden, weight, _ = case
    seen = []

    def note(logits, rows):
        seen.append(logits.shape[0])
        return (logits.sum(-1),)

    (sums,) = through_head(hidden, OutputHead(weight_VH=weight[:VOCAB], vocab_size=VOCAB), note, chunk=3)
    sums.sum().backward()
    assert seen == [3, 3, 1, 3, 3, 1]  # forward, then again in backward


def test_entropy_gradient_of_masked_and_underflowing_columns():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0], [0.0, 0.0, 300.0, 0.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(token_entropy, logits[:1].clone().requires_grad_())
    logits[:, 3] = torch.finfo(torch.float64).min
    logits.requires_grad_()
    entropy = token_entropy(logits, temperature=2.0)
    want = (logits[0, :3] / 2).softmax(-1)
    assert entropy[0].item() == pytest.approx(-(want * want.log()).sum().item(), abs=1e-12)
    assert entropy[1].item() == pytest.approx(0.0, abs=1e-12)
    entropy.sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[:, 3].abs().max() == 0


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature=0"):
        token_entropy(torch.zeros(1, 2), temperature=0)
