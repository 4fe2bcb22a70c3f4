import pytest
import torch

from opd.maths.logprobs import predicting_rows, token_logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.8, 2.5])
@pytest.mark.parametrize("rows", [1, 7, 2500])  # 2500: more than one chunk
def test_value_and_gradient_equal_log_softmax(temperature, rows):
    torch.manual_seed(0)
    logits = torch.randn(rows, 11, dtype=torch.float64) * 4
    ids = torch.randint(0, 11, (rows,))
    weights = torch.randn(rows, dtype=torch.float64)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    got = token_logprobs(ours, ids, temperature=temperature)
    want = (plain / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    (got * weights).sum().backward()
    (want * weights).sum().backward()

    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-12, rtol=0)


def test_bfloat16_logits_are_scored_in_float32():
    logits = (torch.randn(5, 300) * 3).bfloat16()
    ids = torch.arange(5)
    got = token_logprobs(logits, ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logits.float().log_softmax(-1)[torch.arange(5), ids], atol=1e-6, rtol=0)


def test_no_rows():
    assert token_logprobs(torch.empty(0, 5), torch.empty(0, dtype=torch.long)).shape == (0,)


def test_response_rows_are_shifted_by_one():
    # tokens: p p r r r; the rows at positions 1, 2, 3 predict the tokens at 2, 3, 4
    assert list(range(5))[predicting_rows(5, 3)] == [1, 2, 3]
    assert list(range(5))[predicting_rows(5, 0)] == []


def test_refuses_misaligned_lengths_and_temperature_zero():
    with pytest.raises(ValueError, match="3 rows of logits for 2 tokens"):
        token_logprobs(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature=0"):
        token_logprobs(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), temperature=0)
