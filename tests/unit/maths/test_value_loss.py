import torch

from opd.maths.value_loss import value_loss


def test_hand_worked():
    values = torch.tensor([1.0, 1.0, 0.1, -1.0], requires_grad=True)
    returns = torch.tensor([2.0, 0.0, 1.0, 3.0])
    loss, clipped = value_loss(values, torch.zeros(4), returns, clip=0.25)
    # Moved too far towards R: cut. Too far from it: the plain error is larger, and stays. Within the clip: plain.
    assert loss.tolist() == [1.75**2 / 2, 1.0 / 2, torch.tensor(0.9).square().item() / 2, 16.0 / 2]
    assert clipped.tolist() == [1, 0, 0, 0]
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1.0, -0.9, -4.0]))


def test_without_clip_the_minimum_is_the_mean_return():
    returns = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    value = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    loss, _ = value_loss(value.expand(4), torch.full((4,), 0.75), returns, clip=10.0)
    loss.sum().backward()
    assert value.grad == 0


def test_no_gradient_for_returns_and_old_values():
    old, returns = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
    loss, clipped = value_loss(torch.zeros(1), old, returns, clip=0.2)
    assert not loss.requires_grad and not clipped.requires_grad
