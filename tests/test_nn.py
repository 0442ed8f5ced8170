"""fastapd.nn: layers of components, their parameters and state, and the layer that shares another's components."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastapd import Components, functional, ops
from fastapd.components import LayerShape
from fastapd.nn import LinearComponents, TransposedLinearComponents

D_IN, D_OUT, C, RANK, BATCH = 7, 8, 5, 3, 6

axis = pytest.mark.parametrize("n_instances", [None, 2], ids=["noinst", "inst"])
transposed = pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])


def _layer(n_instances: int | None, tied: bool = False, bias: bool = True) -> Any:
    generator = torch.Generator().manual_seed(0)
    layer: Any = LinearComponents(D_IN, D_OUT, C, RANK, n_instances, bias, 3.0, generator, dtype=torch.float64)
    layer = layer.transposed(bias) if tied else layer
    if bias:
        nn.init.normal_(layer.bias)
    return layer


def _inputs(n_instances: int | None, tied: bool = False) -> tuple[Tensor, Tensor]:
    own = () if n_instances is None else (n_instances,)
    x = torch.randn(BATCH, *own, D_OUT if tied else D_IN, dtype=torch.float64)
    return x, torch.rand(BATCH, *own, C, dtype=torch.float64)


class Autoencoder(nn.Module):
    """A toy model of superposition of components: an encoder, and its transpose as the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _layer(2, bias=False)
        self.decoder = TransposedLinearComponents(self.encoder, bias=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.decoder(self.encoder(x, mask), mask).relu()


@axis
@transposed
def test_nn_layer_is_the_naive_formula(n_instances, tied):
    layer = _layer(n_instances, tied)
    x, mask = _inputs(n_instances, tied)
    P = layer.component_weights()
    assert torch.equal(P, layer.A @ layer.B)
    torch.testing.assert_close(layer.weight, P.sum(-3))
    for weights in (mask, mask > 0.5, None):
        kept = torch.ones_like(mask) if weights is None else weights.double()
        wanted = torch.einsum("b...i,...cio,b...c->b...o", x, P, kept) + layer.bias
        torch.testing.assert_close(layer(x, weights), wanted)
    first = mask.transpose(0, 1) if n_instances else mask
    torch.testing.assert_close(
        layer(x, ops.batch_topk(first, 9)), layer(x, functional.batch_topk_mask(mask, 9 / BATCH))
    )


@axis
def test_nn_layer_stores_the_house_layout(n_instances):
    layer = _layer(n_instances)
    own = () if n_instances is None else (n_instances,)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "At": (*own, C, RANK, D_IN),
        "B": (*own, C, RANK, D_OUT),
        "bias": (*own, D_OUT),
    }
    assert layer.A.shape == (*own, C, D_IN, RANK)
    assert layer.A.data_ptr() == layer.At.data_ptr() and layer.At.is_contiguous()


def test_nn_layer_worked_by_hand():
    A, B = torch.tensor([[[1.0], [2.0]], [[0.0], [1.0]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
    layer = LinearComponents.from_factors(A, B, torch.tensor([0.5, 0.0]))
    assert layer.weight.tolist() == [[1.0, 0.0], [2.0, 3.0]]
    x = torch.tensor([[1.0, 1.0]])
    assert layer(x).tolist() == [[3.5, 3.0]]
    assert layer(x, torch.tensor([[True, False]])).tolist() == [[3.5, 0.0]]
    assert layer(x, torch.tensor([[0.0, 2.0]])).tolist() == [[0.5, 6.0]]
    assert layer.transposed()(x).tolist() == [[1.0, 5.0]]
    linear = layer.to_linear()
    assert linear.weight.tolist() == [[1.0, 2.0], [0.0, 3.0]]  # [out, in]
    assert linear(x).tolist() == [[3.5, 3.0]]
    assert layer.transposed().to_linear().bias is None


def test_nn_from_factors_copies():
    A, B = torch.randn(2, C, D_IN, RANK), torch.randn(2, C, RANK, D_OUT)
    layer = LinearComponents.from_factors(A, B)
    assert torch.equal(layer.A, A) and torch.equal(layer.B, B) and layer.n_instances == 2 and layer.bias is None
    with torch.no_grad():
        layer.B.zero_()
    assert B.abs().sum() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_nn_from_linear_has_its_sizes_and_a_frozen_bias(bias):
    linear = nn.Linear(D_IN, D_OUT, bias, dtype=torch.float64)
    before = copy.deepcopy(linear.state_dict())
    layer = LinearComponents.from_linear(linear, C, RANK, generator=torch.Generator().manual_seed(1))
    assert (layer.d_in, layer.d_out, layer.n_components, layer.rank) == (D_IN, D_OUT, C, RANK)
    assert layer.At.dtype == torch.float64
    if bias:
        assert layer.bias is not None and torch.equal(layer.bias, linear.bias) and not layer.bias.requires_grad
        assert layer.bias.data_ptr() != linear.bias.data_ptr()
    else:
        assert layer.bias is None
    assert all(torch.equal(t, before[name]) for name, t in linear.state_dict().items())
    assert LinearComponents.from_linear(linear, C).rank == min(D_IN, D_OUT)
    # W of the linear layer is the components' sum once they are its factors
    whole = LinearComponents.from_factors(linear.weight.detach().mT[None], torch.eye(D_OUT, dtype=torch.float64)[None])
    assert functional.faithfulness_loss(whole.A, whole.B, linear.weight.mT).item() == 0
    assert torch.equal(whole.to_linear().weight, linear.weight)


@axis
def test_nn_layer_can_be_trained_to_be_faithful(n_instances):
    layer = _layer(n_instances, bias=False)
    target = torch.randn_like(layer.weight)
    optimiser = torch.optim.Adam(layer.parameters(), lr=3e-2)
    for _ in range(300):
        optimiser.zero_grad()
        loss = functional.faithfulness_loss(layer.A, layer.B, target).sum()
        loss.backward()
        optimiser.step()
    assert loss < 1e-3


@pytest.mark.parametrize("n_instances", [None, 4])
def test_nn_initial_scale_is_that_of_components(n_instances):
    n = n_instances or 1
    layer = LinearComponents(50, 20, 30, 10, n_instances, init_scale=2.0, generator=torch.Generator().manual_seed(0))
    assert layer.At.std().item() == pytest.approx(2 * math.sqrt(2 / ((30 + n) * 50 * 10)), rel=0.05)
    assert layer.B.std().item() == pytest.approx(2 * math.sqrt(2 / ((30 + n) * 20 * 10)), rel=0.05)
    generator = torch.Generator().manual_seed(0)
    same = Components({"l": LayerShape(50, 20)}, 30, 10, n, 2.0, generator)
    assert torch.equal(layer.At.reshape(same.At["l"].shape), same.At["l"])
    assert torch.equal(layer.B.reshape(same.B["l"].shape), same.B["l"])


@axis
def test_nn_normalise_and_tangent_gradients(n_instances):
    layer = _layer(n_instances)
    layer.tangent_gradients_()  # nothing to do yet
    B = layer.B.detach().clone()
    direction = layer.A / layer.A.norm(dim=-2, keepdim=True)
    layer.normalise_()
    torch.testing.assert_close(layer.A, direction)
    assert torch.equal(layer.B, B)
    x, mask = _inputs(n_instances)
    layer(x, mask).square().sum().backward()
    grad = layer.At.grad.clone()
    layer.tangent_gradients_()
    along = (grad * layer.At.detach()).sum(-1, keepdim=True)
    assert along.abs().max() > 1e-3
    torch.testing.assert_close(layer.At.grad, grad - along * layer.At.detach())


def test_nn_transposed_layer_shares_its_owners_components():
    model = Autoencoder()
    encoder, decoder = model.encoder, model.decoder
    assert set(dict(model.named_parameters())) == {"encoder.At", "encoder.B", "decoder.bias"}
    assert decoder.owner is encoder and (decoder.d_in, decoder.d_out) == (D_OUT, D_IN)
    torch.testing.assert_close(decoder.weight, encoder.weight.mT)
    torch.testing.assert_close(decoder.component_weights(), encoder.component_weights().mT)
    with torch.no_grad():
        encoder.B.mul_(2)
    torch.testing.assert_close(decoder.weight, encoder.weight.mT)
    x, mask = _inputs(2)
    model(x, mask).sum().backward()
    both = encoder.B.grad.clone()
    encoder.B.grad = None
    decoder(encoder(x, mask).detach(), mask).relu().sum().backward()
    assert encoder.B.grad is not None and not torch.allclose(encoder.B.grad, both)


def _saved(model: nn.Module, tmp_path: Any) -> nn.Module:
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = Autoencoder()
    for p in other.parameters():
        nn.init.normal_(p)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    return other


COPIES: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "state_dict": _saved,
    "deepcopy": lambda model, tmp_path: copy.deepcopy(model),
    "pickle": lambda model, tmp_path: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_nn_copies_compute_the_same_and_are_independent(kind, tmp_path):
    model = Autoencoder()
    nn.init.normal_(model.decoder.bias)
    other: Any = COPIES[kind](model, tmp_path)
    x, mask = _inputs(2)
    wanted = model(x, mask)
    assert torch.equal(other(x, mask), wanted)
    assert other.decoder.owner is other.encoder
    with torch.no_grad():
        model.encoder.At.zero_()
    assert torch.equal(other(x, mask), wanted)


def test_nn_dtype_moves_with_the_model():
    model = Autoencoder().to(torch.float32)
    x, mask = _inputs(2)
    assert model.decoder.A.dtype == torch.float32
    assert model(x.float(), mask.float()).dtype == torch.float32
    with pytest.raises(
        TypeError, match=r"^masked_linear: x must have the dtype of A, torch.float32, got torch.float64$"
    ):
        model(x)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_nn_model_compiles_to_one_graph(kind):
    x, mask = _inputs(2)
    weights = {"none": None, "bool": mask > 0.5, "float": mask}[kind]
    model, other = Autoencoder(), Autoencoder()
    wanted = model(x, weights)
    wanted.sum().backward()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    found = torch.compile(other, fullgraph=True, backend=counter)(x, weights)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    for one, same in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, same.grad)


@axis
@transposed
def test_nn_layer_passes_gradcheck(n_instances, tied):
    layer = _layer(n_instances, tied)
    x, mask = _inputs(n_instances, tied)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, mask: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, mask))

    leaves = [t.detach().clone().requires_grad_() for t in (x, mask, *layer.parameters())]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@axis
def test_nn_layer_of_an_empty_batch(n_instances):
    layer = _layer(n_instances)
    x, mask = _inputs(n_instances)
    y = layer(x[:0], mask[:0])
    assert y.shape == (0, *layer.bias.shape)
    y.sum().backward()
    assert layer.B.grad.abs().sum() == 0


def test_nn_repr_says_the_sizes():
    assert repr(_layer(2)) == "LinearComponents(7, 8, C=5, rank=3, n_instances=2, bias=True)"
    assert repr(_layer(None, True, False)) == (
        "TransposedLinearComponents(8, 7, C=5, rank=3, n_instances=None, bias=False)"
    )


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "d_in": (
        lambda: LinearComponents(0, 8, 5),
        ValueError,
        "LinearComponents: d_in must be in [1, 2**31), got 0",
    ),
    "C": (lambda: LinearComponents(7, 8, 2.0), TypeError, "LinearComponents: C must be an int, got float 2.0"),
    "C none": (
        lambda: LinearComponents(7, 8, None),
        TypeError,
        "LinearComponents: C must be an int, got NoneType None",
    ),
    "rank": (lambda: LinearComponents(7, 8, 5, 0), ValueError, "LinearComponents: rank must be in [1, 2**31), got 0"),
    "n_instances": (
        lambda: LinearComponents(7, 8, 5, n_instances=-1),
        ValueError,
        "LinearComponents: n_instances must be in [1, 2**31), got -1",
    ),
    "factors": (
        lambda: LinearComponents.from_factors(torch.zeros(5, 7, 3), torch.zeros(5, 4, 8)),
        ValueError,
        "LinearComponents.from_factors: A and B must share rank, got A [5, 7, 3] and B [5, 4, 8]",
    ),
    "no factors": (
        lambda: LinearComponents.from_factors(torch.zeros(0, 7, 3), torch.zeros(0, 3, 8)),
        ValueError,
        "LinearComponents.from_factors: A and B must not be empty, got A [0, 7, 3] and B [0, 3, 8]",
    ),
    "bias": (
        lambda: LinearComponents.from_factors(torch.zeros(5, 7, 3), torch.zeros(5, 3, 8), torch.zeros(7)),
        ValueError,
        "LinearComponents.from_factors: bias must have shape [8], got [7]",
    ),
    "linear": (
        lambda: LinearComponents.from_linear(nn.Conv1d(7, 8, 1), 5),
        TypeError,
        "LinearComponents.from_linear: linear must be an nn.Linear, got Conv1d",
    ),
    "owner": (
        lambda: TransposedLinearComponents(nn.Linear(7, 8)),
        TypeError,
        "TransposedLinearComponents: owner must be a LinearComponents, got Linear",
    ),
    "to_linear": (
        lambda: _layer(2).to_linear(),
        ValueError,
        "LinearComponents.to_linear: n_instances must be None, got 2; an nn.Linear holds one matrix",
    ),
    "mask": (
        lambda: _layer(2)(torch.zeros(6, 2, 7).double(), torch.zeros(2, 6, 5).double()),
        ValueError,
        "masked_linear: mask must have shape [.., n_instances, n_components] = [6, 2, 5], got [2, 6, 5]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nn_refuses(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
