import torch
from torch import nn

from opd.decoding.packed_linear import PackedLinear, pack_linears


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 768), nn.Linear(768, 512, bias=False), nn.Linear(512, 8)).eval()


def test_packed_layers_give_what_they_gave():
    model, inputs = make_model(), torch.randn(2, 3, 512)
    with torch.inference_mode():
        want = model(inputs)
        assert pack_linears(model) == 2 * 512 * 768 * 4
        got = model(inputs)
    assert [type(m) for m in model] == [PackedLinear, PackedLinear, nn.Linear]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert pack_linears(model) == 0  # nothing is left to pack


def test_weights_that_change_in_place_are_packed_anew():
    model, other = make_model(), make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    inputs = torch.randn(4, 512)
    pack_linears(model)
    with torch.inference_mode():
        model(inputs)
    with torch.no_grad():
        for mine, new in zip(model.state_dict(keep_vars=True).values(), other.state_dict().values(), strict=True):
            mine.copy_(new)
    with torch.inference_mode():
        torch.testing.assert_close(model(inputs), other(inputs), atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == list(other.state_dict())
