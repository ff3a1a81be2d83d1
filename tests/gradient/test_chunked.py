"""The chunked gradient of models and losses that are not ours."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_cft.gradient import chunked, chunked_gradient
from lowmem_cft_kernels import Candidates, info_nce_loss

ITEMS = 23


class Toy(nn.Module):
    """Recurrent, with dropout, in float64."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.GRU(5, 8, batch_first=True)
        self.drop = nn.Dropout(rate)
        self.out = nn.Linear(8, 6)
        self.double()

    def forward(self, x_BTI: Tensor) -> Tensor:
        hidden_BTH, _ = self.rnn(x_BTI)
        out: Tensor = self.out(self.drop(hidden_BTH[:, -1]))
        return out


def contrast(emb_ND: Tensor) -> Tensor:
    """InfoNCE of the first 11 items with the rest, normalised."""
    value: Tensor = info_nce_loss(
        emb_ND[:11],
        emb_ND[11:],
        Candidates(target=torch.arange(11)),
        temperature=0.1,
        normalize=True,
    )
    return value


def spread(emb_ND: Tensor) -> Tensor:
    """A loss of all pairs, of no library."""
    return torch.pdist(emb_ND).mul(-1).exp().mean()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(ITEMS, 4, 5, generator=torch.Generator().manual_seed(1)).double()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def plain(model: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model(inputs)).backward()
    found = gradients(model)
    model.zero_grad()
    return found


@pytest.mark.parametrize("loss", [contrast, spread])
@pytest.mark.parametrize("chunk_tokens", [1, 9, 40, 1000])
@pytest.mark.parametrize("keep_graphs", [False, True])
def test_any_chunks_give_the_plain_gradient(
    inputs: Tensor, loss: Callable[[Tensor], Tensor], chunk_tokens: int, keep_graphs: bool
) -> None:
    model = Toy(0.0)
    wanted = plain(model, inputs, loss)
    found = chunked_gradient(
        lambda place_B: model(inputs[place_B]),
        loss,
        lengths=[1 + i % 7 for i in range(ITEMS)],
        parameters=list(model.parameters()),
        chunk_tokens=chunk_tokens,
        keep_graphs=keep_graphs,
    )
    assert found.loss == pytest.approx(float(loss(model(inputs)).detach()), rel=1e-12)
    assert not found.loss.requires_grad
    got = gradients(model)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12)


def test_dropout_is_drawn_again(inputs: Tensor) -> None:
    """Against one backward over the graphs of the same chunks in the same order."""
    model, places = Toy(0.4), list(torch.arange(ITEMS).split(5))
    torch.manual_seed(3)
    emb_ND = torch.cat([model(inputs[place_B]) for place_B in places])
    spread(emb_ND).backward()
    wanted = gradients(model)
    model.zero_grad()
    torch.manual_seed(3)
    chunked_gradient(
        lambda place_B: model(inputs[place_B]),
        spread,
        lengths=[1] * ITEMS,
        parameters=list(model.parameters()),
        chunk_tokens=5,
    )
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-10, atol=1e-12)


def test_dropout_in_smaller_chunks_is_refused(inputs: Tensor) -> None:
    """Memory runs out in the second pass: masks of half a chunk are not the chunk's."""
    model, calls = Toy(0.4), [0]

    def encode(place_B: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 7:  # the second chunk of the second pass
            raise torch.OutOfMemoryError("CUDA out of memory: injected")
        return model(inputs[place_B])  # type: ignore[no-any-return]

    options: dict[str, Any] = {
        "lengths": [1] * ITEMS,
        "parameters": list(model.parameters()),
        "chunk_tokens": 5,
    }
    with pytest.raises(RuntimeError, match="lower chunk_tokens"):
        chunked_gradient(encode, spread, **options)
    calls[0] = 0
    model.eval()
    wanted = plain(model, inputs, spread)
    found = chunked_gradient(encode, spread, **options)
    assert found.plan.backward_tokens < 5
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-10, atol=1e-12)


def test_gradients_add_up_and_the_loss_may_be_trained(inputs: Tensor) -> None:
    """As autograd does: onto what is there, times the scale, also for the loss's own parameters."""
    model, scale = Toy(0.0), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    other = nn.Linear(2, 2).double()

    def scaled(emb_ND: Tensor) -> Tensor:
        return spread(emb_ND * scale)

    (3 * scaled(model(inputs))).backward()
    parameters = [scale, *model.parameters(), *other.parameters()]
    wanted = [None if p.grad is None else 2 * p.grad for p in parameters]
    chunked_gradient(
        lambda place_B: model(inputs[place_B]),
        scaled,
        lengths=[1] * ITEMS,
        parameters=parameters,
        chunk_tokens=4,
        gradient_scale=3.0,
    )
    for parameter, gradient in zip(parameters, wanted, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_mistakes() -> None:
    model = nn.Linear(2, 2)
    encode = lambda place_B: model(torch.ones(len(place_B), 2))
    with pytest.raises(ValueError, match="lengths: got none"):
        chunked_gradient(encode, torch.sum, lengths=[], parameters=list(model.parameters()))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters: none of them"):
        chunked_gradient(encode, torch.sum, lengths=[1], parameters=list(model.parameters()))


def test_the_example_holds() -> None:
    failed, tried = doctest.testmod(chunked)
    assert tried > 4
    assert failed == 0
