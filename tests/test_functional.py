"""fastapd.functional: the formulas against naive ones in float64, the golden arrays, and values worked by hand."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastapd import functional as F
from fastapd import ops, use_backend

_spec = importlib.util.spec_from_file_location("golden_arrays", Path(__file__).with_name("golden_arrays.py"))
assert _spec is not None
assert _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

BATCH, C, RANK, N_OUTPUTS = 6, 5, 3, 4
WIDTHS = {"in": (7, 8), "out": (8, 2)}

dtypes = pytest.mark.parametrize("dtype", golden.TOLERANCE, ids=["float64", "float32"])
axis = pytest.mark.parametrize("n_instances", [None, 3], ids=["noinst", "inst"])


class Problem:
    """Two layers' factors, inputs, gradients, weights and masks, in the research code's axes."""

    def __init__(self, n_instances: int | None, dtype: torch.dtype = torch.float64, batch: int = BATCH) -> None:
        own = () if n_instances is None else (n_instances,)
        self.own, self.n_instances = own, n_instances

        def draw(*axes: int) -> Tensor:
            return torch.randn(*axes, dtype=torch.float64).to(dtype)

        self.A = {n: draw(*own, C, i, RANK) for n, (i, _) in WIDTHS.items()}
        self.B = {n: draw(*own, C, RANK, o) for n, (_, o) in WIDTHS.items()}
        self.W = {n: draw(*own, i, o) for n, (i, o) in WIDTHS.items()}
        self.xs = {n: draw(batch, *own, i) for n, (i, _) in WIDTHS.items()}
        self.gs = {n: draw(batch, *own, N_OUTPUTS, o) for n, (_, o) in WIDTHS.items()}
        self.scores = draw(batch, *own, C)
        self.output, self.target = draw(batch, *own, N_OUTPUTS), draw(batch, *own, N_OUTPUTS)
        self.acts = {n: draw(batch, *own, i) for n, (i, _) in WIDTHS.items()}
        self.weights = torch.rand(batch, *own, C, dtype=torch.float64).to(dtype)
        self.mask = torch.rand(batch, *own, C) < 0.4
        self.bias = draw(*own, WIDTHS["in"][1])

    @property
    def n_params(self) -> int:
        return sum(i * o for i, o in WIDTHS.values())


def _P(p: Problem, name: str) -> Tensor:
    return torch.einsum("...cim,...cmo->...cio", p.A[name], p.B[name])


def _naive_attributions(p: Problem) -> Tensor:
    effect = sum(torch.einsum("b...i,...cio,b...ko->b...ck", p.xs[n], _P(p, n), p.gs[n]) for n in WIDTHS)
    assert isinstance(effect, Tensor)
    return effect.square().sum(-1)


def _naive_activation(p: Problem) -> Tensor:
    parts = [torch.einsum("b...i,...cio->b...co", p.xs[n], _P(p, n)).square().sum(-1) for n in WIDTHS]
    return parts[0] + parts[1]


def _naive_schatten(p: Problem, mask: Tensor, exponent: float, eps: float = 1e-16) -> Tensor:
    total = torch.zeros(p.own, dtype=torch.float64)
    for n in WIDTHS:
        S = p.A[n].square().sum(-2) * p.B[n].square().sum(-1)  # [.., C, m]
        total = total + (mask.double().unsqueeze(-1) * S + eps).pow(exponent / 2).sum((0, -1, -2))
    return total / (p.n_params * mask.shape[0])


def _naive_exact(p: Problem, mask: Tensor, exponent: float, eps: float = 1e-16) -> Tensor:
    total = torch.zeros(p.own, dtype=torch.float64)
    for n in WIDTHS:
        sigma = torch.linalg.svdvals(_P(p, n))  # [.., C, min(d_in, d_out)], of which RANK may be nonzero
        kept = sigma[..., :RANK]
        kept = torch.nn.functional.pad(kept, (0, RANK - kept.shape[-1]))
        total = total + torch.where(mask.unsqueeze(-1), kept.square() + eps, eps).pow(exponent / 2).sum((0, -1, -2))
    return total / (p.n_params * mask.shape[0])


def _naive_faithfulness(p: Problem) -> Tensor:
    return sum((_P(p, n).sum(-3) - p.W[n]).square().sum((-2, -1)) for n in WIDTHS) / p.n_params


def _naive_linear(x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    parts = (
        torch.einsum("...i,...cio->...co", x, A @ B) if A.dim() == 3 else torch.einsum("...ni,ncio->...nco", x, A @ B)
    )
    y = (parts if mask is None else parts * mask.to(x.dtype).unsqueeze(-1)).sum(-2)
    return y if bias is None else y + bias


def _lists(p: Problem, *names: str) -> list[list[Tensor]]:
    return [list(getattr(p, name).values()) for name in names]


def _close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------------------- naive formulas, float64


@axis
def test_grad_attributions_are_the_naive_formula(n_instances):
    p = Problem(n_instances)
    wanted = _naive_attributions(p)
    _close(F.grad_attributions(p.xs, p.gs, p.A, p.B), wanted)
    _close(F.grad_attributions(*_lists(p, "xs", "gs", "A", "B")), wanted)
    _close(F.grad_attributions(p.xs, p.gs, p.A, p.B, norm=True), (wanted / N_OUTPUTS).sqrt())
    shared = {n: g[:1] for n, g in p.gs.items()}
    p.gs = {n: g.expand(BATCH, *g.shape[1:]) for n, g in shared.items()}
    _close(F.grad_attributions(p.xs, shared, p.A, p.B), _naive_attributions(p))


@axis
def test_grad_attributions_match_layers_by_name_not_by_order(n_instances):
    p = Problem(n_instances)
    other_order = dict(reversed(p.xs.items()))
    _close(F.grad_attributions(other_order, p.gs, p.A, p.B), _naive_attributions(p))


@axis
def test_activation_attributions_are_the_naive_formula(n_instances):
    p = Problem(n_instances)
    _close(F.activation_attributions(p.xs, p.A, p.B), _naive_activation(p))


@axis
def test_ablation_attributions_are_the_naive_formula(n_instances):
    p = Problem(n_instances)
    x, A, B = p.xs["in"], p.A["in"], p.B["in"]
    seen = []

    def forward(mask: Tensor) -> Tensor:
        seen.append(mask)
        return F.masked_linear(x, A, B, mask).square()

    output = F.masked_linear(x, A, B).square()
    found = F.ablation_attributions(forward, output, C)
    for c in range(C):
        others = torch.ones(C, dtype=torch.float64)
        others[c] = 0
        assert torch.equal(seen[c], others.expand(BATCH, *p.own, C))
        without = _naive_linear(x, A, B, others.expand(BATCH, *p.own, C), None).square()
        _close(found[..., c], (output - without).square().mean(-1))


@axis
@pytest.mark.parametrize("exponent", [0.5, 0.9, 2.0])
def test_schatten_loss_is_the_naive_formula(n_instances, exponent):
    p = Problem(n_instances)
    _close(F.schatten_loss(p.A, p.B, p.mask, exponent, p.n_params), _naive_schatten(p, p.mask, exponent))
    _close(F.schatten_loss(p.A, p.B, p.weights, exponent, p.n_params), _naive_schatten(p, p.weights, exponent))
    _close(F.schatten_loss(p.A, p.B, p.mask, exponent, p.n_params, 1e-3), _naive_schatten(p, p.mask, exponent, 1e-3))
    exact = F.schatten_loss(p.A, p.B, p.mask, exponent, p.n_params, 1e-3, exact=True)
    _close(exact, _naive_exact(p, p.mask, exponent, 1e-3))


@axis
def test_schatten_loss_counts_the_eps_of_what_is_off(n_instances):
    """What the research code has: eps^{p/2} for every entry that is masked out."""
    p = Problem(n_instances)
    nothing = torch.zeros_like(p.mask)
    found = F.schatten_loss(p.A, p.B, nothing, 0.9, p.n_params, eps=1e-4)
    wanted = len(WIDTHS) * C * RANK * 1e-4**0.45 / p.n_params
    _close(found, torch.full(p.own, wanted, dtype=torch.float64))


@axis
def test_faithfulness_loss_is_the_naive_formula(n_instances):
    p = Problem(n_instances)
    _close(F.faithfulness_loss(p.A, p.B, p.W), _naive_faithfulness(p))
    _close(F.faithfulness_loss(*_lists(p, "A", "B", "W"), n_params=10), _naive_faithfulness(p) * p.n_params / 10)
    assert F.param_match_loss is F.faithfulness_loss


@axis
def test_lp_losses_are_the_naive_formula(n_instances):
    p = Problem(n_instances)
    wanted = (p.scores.abs() / 11 + 1e-16) ** 0.45
    _close(F.lp_weights(p.scores, 11, 0.9), wanted)
    _close(F.lp_sparsity_loss(p.scores, 11, 0.9), wanted.sum(-1).mean(0))


@axis
def test_reconstructions_are_the_naive_formulas(n_instances):
    p = Problem(n_instances)
    _close(F.recon_mse(p.output, p.target), ((p.output - p.target) ** 2).mean((0, -1)))
    P, Q = p.target.softmax(-1), p.output.softmax(-1)
    _close(F.recon_kl(p.output, p.target), (P * (P / Q).log()).sum(-1).mean(0))
    error = sum((p.acts[n] - p.xs[n]).square().sum(-1) for n in WIDTHS)
    _close(F.act_recon_loss(p.acts, p.xs), error.mean(0) / sum(i for i, _ in WIDTHS.values()))


@axis
@pytest.mark.parametrize("kind", ["none", "bool", "float", "selection"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["nobias", "bias"])
def test_masked_linear_is_the_naive_formula(n_instances, kind, with_bias):
    p = Problem(n_instances)
    x, A, B = p.xs["in"], p.A["in"], p.B["in"]
    first = p.scores.transpose(0, 1) if n_instances else p.scores
    selection = ops.batch_topk(first, 8)
    mask: Any = {"none": None, "bool": p.mask, "float": p.weights, "selection": selection}[kind]
    dense = mask if kind != "selection" else F.batch_topk_mask(p.scores, 8 / BATCH)
    bias = p.bias if with_bias else None
    _close(F.masked_linear(x, A, B, mask, bias), _naive_linear(x, A, B, dense, bias))


@axis
@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_masked_linear_takes_any_axes_of_samples(n_instances, lead, masked):
    p = Problem(n_instances)
    A, B = p.A["in"], p.B["in"]
    x = torch.randn(*lead, *p.own, 7, dtype=torch.float64)
    mask = torch.rand(*lead, *p.own, C, dtype=torch.float64) if masked else None
    _close(F.masked_linear(x, A, B, mask, p.bias), _naive_linear(x, A, B, mask, p.bias))


@axis
def test_sums_and_parts_are_the_products(n_instances):
    p = Problem(n_instances)
    _close(F.component_weights(p.A["in"], p.B["in"]), _P(p, "in"))
    _close(F.component_sum(p.A["in"], p.B["in"]), _P(p, "in").sum(-3))


@axis
def test_output_gradients_are_the_jacobian(n_instances):
    p = Problem(n_instances)
    x = p.xs["in"].clone().requires_grad_()
    hidden = torch.einsum("b...i,...io->b...o", x, p.W["in"])
    output = torch.einsum("b...i,...io->b...o", hidden.tanh(), p.W["out"]).square()
    found = F.output_gradients(output, {"x": x, "hidden": hidden}, retain_graph=True)
    slope = 2 * torch.einsum("b...i,...io->b...o", hidden.tanh(), p.W["out"])
    to_hidden = torch.einsum("b...o,...io,b...i->b...oi", slope, p.W["out"], 1 - hidden.tanh() ** 2)
    _close(found["hidden"], to_hidden)
    _close(found["x"], torch.einsum("b...oh,...ih->b...oi", to_hidden, p.W["in"]))
    assert not found["x"].requires_grad
    assert isinstance(F.output_gradients(output, [hidden], retain_graph=True), list)
    _close(F.output_gradients(output, hidden), to_hidden)


@axis
def test_attributions_of_a_network_are_derivatives_along_the_components(n_instances):
    """From activations and gradients that a user takes from a network of his own."""
    p = Problem(n_instances)
    x = p.xs["in"]
    hidden = torch.einsum("b...i,...io->b...o", x, p.W["in"]).requires_grad_()
    act = hidden.tanh()
    output = torch.einsum("b...i,...io->b...o", act, p.W["out"])
    gs = F.output_gradients(output, [hidden, output])
    A, B = _lists(p, "A", "B")
    found = F.grad_attributions([x, act.detach()], gs, A, B)
    h = 1e-6
    for c in range(C):

        def run(t: float, c: int = c) -> Tensor:
            W1, W2 = (p.W[n] + t * _P(p, n).select(-3, c) for n in WIDTHS)
            return torch.einsum("b...i,...io->b...o", torch.einsum("b...i,...io->b...o", x, W1).tanh(), W2)

        slope = (run(h) - run(-h)) / (2 * h)
        torch.testing.assert_close(found[..., c], slope.square().sum(-1), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- worked by hand


def test_masks_worked_by_hand():
    scores = torch.tensor([[5.0, 1.0, 4.0], [3.0, 2.0, 0.0]])
    assert F.batch_topk_mask(scores, 1.0).tolist() == [[True, False, True], [False] * 3]
    assert F.batch_topk_mask(scores, 1.5).tolist() == [[True, False, True], [True, False, False]]
    assert F.topk_mask(scores, 1).tolist() == [[True, False, False], [True, False, False]]
    assert F.batch_topk_mask(scores, 0.49).sum() == 0  # int(0.98)
    assert F.batch_topk_mask(scores, 3).all() and F.topk_mask(scores, 3).all()
    assert not F.topk_mask(scores, 0).any()


def test_masks_break_ties_by_the_lowest_index_and_take_nan_for_the_largest():
    assert F.batch_topk_mask(torch.zeros(2, 3), 1.0).tolist() == [[True, True, False], [False] * 3]
    assert F.topk_mask(torch.zeros(2, 3), 1).tolist() == [[True, False, False]] * 2
    scores = torch.tensor([[1e30, math.nan], [math.inf, -math.inf]])
    assert F.batch_topk_mask(scores, 0.5).tolist() == [[False, True], [False, False]]


def test_each_instance_selects_for_itself():
    scores = torch.tensor([[[1.0, 2.0], [10.0, 0.0]], [[3.0, 4.0], [20.0, 30.0]]])  # [batch, n_instances, C]
    mask = F.batch_topk_mask(scores, 1.0)
    assert mask.tolist() == [[[False, False], [False, False]], [[True, True], [True, True]]]


@pytest.mark.parametrize(("k", "batch", "kept"), [(0.211, 2048, 432), (1.28, 256, 327), (0.2217, 10000, 2217)])
def test_batch_topk_mask_keeps_the_papers_numbers(k, batch, kept):
    assert F.batch_topk_mask(torch.rand(batch, C), k).sum() == kept


def test_losses_worked_by_hand():
    A, B = torch.tensor([[[3.0], [4.0]]]), torch.tensor([[[2.0, 0.0]]])  # one component, sigma = 5 * 2
    mask = torch.tensor([[True], [False]])
    for exact in (False, True):
        loss = F.schatten_loss(A, B, mask, 1.0, 4, eps=0.0, exact=exact)
        assert loss.item() == pytest.approx(10 / (4 * 2))
    assert F.faithfulness_loss(A, B, torch.tensor([[6.0, 1.0], [8.0, 2.0]])).item() == pytest.approx(5 / 4)
    assert F.lp_sparsity_loss(torch.tensor([[4.0, 1.0], [0.0, 9.0]]), 1, 1.0, 0.0).item() == pytest.approx(3.0)
    assert F.recon_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])).item() == pytest.approx(2.5)
    assert F.act_recon_loss([torch.ones(2, 1), torch.zeros(2, 3)], [torch.zeros(2, 1), torch.ones(2, 3)]).item() == 1
    kl = F.recon_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]]))
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_factored_schatten_bounds_the_exact_one():
    p = Problem(None)
    for exponent in (0.3, 1.0):
        factored, exact = (F.schatten_loss(p.A, p.B, p.mask, exponent, 1, exact=e) for e in (False, True))
        assert factored > exact * 1.001


def test_kl_of_an_impossible_output_is_finite():
    target = torch.tensor([[0.0, -math.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    logits = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = F.recon_kl(logits, target)
    p = torch.tensor([1.0, math.e], dtype=torch.float64) / (1 + math.e)
    q = logits.detach().softmax(-1)[0, [0, 2]]
    assert loss.item() == pytest.approx((p * (p / q).log()).sum().item())
    loss.backward()
    assert logits.grad.isfinite().all() and target.grad[0, [0, 2]].isfinite().all()


def test_unit_norm_and_tangent_gradient_worked_by_hand():
    A = torch.tensor([[[3.0, 0.0], [4.0, 0.0]]])
    assert F.unit_norm_(A) is A
    assert torch.allclose(A, torch.tensor([[[0.6, 0.0], [0.8, 0.0]]]))
    grad = torch.tensor([[[1.0, 5.0], [0.0, 6.0]]])
    assert F.tangent_gradient_(grad, A) is grad
    assert torch.allclose(grad, torch.tensor([[[0.64, 5.0], [-0.48, 6.0]]]))


@axis
@pytest.mark.parametrize("house", [True, False])
def test_unit_norm_of_parameters_in_any_layout(n_instances, house):
    own = () if n_instances is None else (n_instances,)
    At = torch.randn(*own, C, RANK, 7, dtype=torch.float64)
    A = (At.mT if house else At.mT.contiguous()).requires_grad_()
    before, grad = A.detach().clone(), torch.randn(A.shape, dtype=torch.float64)
    fixed = grad.clone() if house else grad.mT.contiguous().mT
    version = A._version
    F.unit_norm_(A)
    assert A._version > version and A.grad_fn is None
    unit = before / before.norm(dim=-2, keepdim=True)
    _close(A.detach(), unit)
    F.tangent_gradient_(fixed, A)
    _close(fixed, grad - (grad * unit).sum(-2, keepdim=True) * unit)
    assert (fixed * unit).sum(-2).abs().max() < 1e-12


def test_lr_schedule_worked_by_hand():
    assert [F.lr_schedule(s, 10, 2.0, warmup=0.2) for s in range(4)] == [0.0, 1.0, 2.0, 2.0]
    assert F.lr_schedule(5, 10, 2.0, "linear") == 1.0
    assert F.lr_schedule(5, 11, 2.0, "cosine") == pytest.approx(math.sqrt(2))
    assert F.lr_schedule(6, 10, 2.0, "exponential", halflife=3) == 0.5
    assert F.lr_schedule(0, 1, 2.0, "cosine") == 2.0


# --------------------------------------------------------------------------------------------------- the golden arrays


@dtypes
@pytest.mark.parametrize("backend", [("reference",), ("cpu", "reference")], ids=["reference", "cpu"])
@pytest.mark.parametrize("name", ["attr_resid_1layer", "attr_resid_2layer", "attr_resid_2layer_bias_gelu_outact_inst3"])
def test_attributions_reproduce_the_golden_arrays(name, dtype, backend):
    z = golden.Arrays(name, dtype)
    layers = [n[: -len(".A")] for n in z.names("spd/") if n.endswith(".A")]
    A, B = ({n: z[f"spd/{n}.{kind}"].requires_grad_() for n in layers} for kind in "AB")
    xs = {n: z[f"f64/pre/{n}"] for n in layers}
    gs = {n: z[f"f64/jac/{n}"].permute(1, 2, 0, 3) for n in layers}  # of the file's [n_outputs, batch, n, d_out]
    with use_backend(*backend):
        found = F.grad_attributions(xs, gs, A, B)
        z.assert_close(found, "f64/grad_attributions")
        found.sum().backward()
        mask = F.batch_topk_mask(found, 1.5)
    z.assert_mask(mask, "f64/batch_topk_1.5_mask")
    for n in layers:
        z.assert_close(A[n].grad, f"f64/dsumattr/{n}.A")
        z.assert_close(B[n].grad, f"f64/dsumattr/{n}.B")


@dtypes
def test_attributions_of_tied_layers_reproduce_the_golden_arrays(dtype):
    z = golden.Arrays("attr_tms_tied", dtype)
    A1, B1 = z["spd/linear1.A"], z["spd/linear1.B"]
    A, B = [A1, B1.mT], [B1, A1.mT]
    W, b = z["target/linear1.weight"], z["target/b_final"]
    x = z["batch"]
    hidden = torch.einsum("bni,nih->bnh", x, W).requires_grad_()
    out = torch.einsum("bnh,nih->bni", hidden, W)
    output = (out + b).relu()
    z.assert_close(output, "f64/target_out")
    gs = F.output_gradients(output, [hidden, out])
    z.assert_close(gs[0].permute(2, 0, 1, 3), "f64/jac/linear1")
    z.assert_close(gs[1].permute(2, 0, 1, 3), "f64/jac/linear2")
    attributions = F.grad_attributions([x, hidden.detach()], gs, A, B)
    z.assert_close(attributions, "f64/grad_attributions")

    def run(mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = F.masked_linear(x, A[0], B[0], mask)
        return h, F.masked_linear(h, A[1], B[1], mask, z["spd/b_final"]).relu()

    h, full = run()
    z.assert_close(full, "f64/spd_out")
    z.assert_close(F.activation_attributions([x, h], A, B), "f64/activation_attributions")
    z.assert_close(F.ablation_attributions(lambda mask: run(mask)[1], full, 8), "f64/ablation_attributions")
    mask = F.batch_topk_mask(attributions, 1.5)
    z.assert_mask(mask, "f64/batch_topk_1.5_mask")
    z.assert_close(run(mask)[1], "f64/spd_out_topk")


@dtypes
def test_attributions_without_instances_reproduce_the_golden_arrays(dtype):
    z = golden.Arrays("attr_no_instances", dtype)
    hidden = (z["x"] @ z["W1"]).requires_grad_()
    out = hidden.relu() @ z["W2"]
    gs = F.output_gradients(out.sigmoid(), (hidden, out))
    z.assert_close(gs[0].movedim(1, 0), "f64/jac_l1")
    xs, A, B = [z["x"], hidden.relu().detach()], [z["A1"], z["A2"]], [z["B1"], z["B2"]]
    z.assert_close(F.grad_attributions(xs, gs, A, B), "f64/grad_attributions")
    z.assert_close(F.activation_attributions(xs, A, B), "f64/activation_attributions")


@dtypes
def test_masks_reproduce_the_golden_arrays(dtype):
    z = golden.Arrays("topk_mask", dtype)
    for scores, infix in (("scores", ""), ("scores_inst", "inst_")):
        for k in ("0.211", "1.0", "1.28", "2.5"):
            z.assert_mask(F.batch_topk_mask(z[scores], float(k)), f"mask_{infix}batch_k{k}")
        for k in (1, 3):
            z.assert_mask(F.topk_mask(z[scores], k), f"mask_{infix}sample_k{k}")


@dtypes
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("p", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("where", ["noinst", "inst"])
def test_schatten_loss_reproduces_the_golden_arrays(where, p, kind, dtype):
    z = golden.Arrays("schatten", dtype)
    A, B = ({n: z[f"{where}/{f}/{n}"].requires_grad_() for n in ("l1", "l2")} for f in "AB")
    given = torch.from_numpy(z.file[f"{where}/{kind}_mask"])
    mask = given if kind == "bool" else given.to(dtype).requires_grad_()
    loss = F.schatten_loss(A, B, mask, p, int(z.file["n_params"]))
    prefix = f"{where}/f64/p{p}/{kind}/"
    z.assert_close(loss, prefix + "loss")
    loss.mean().backward()
    for n in ("l1", "l2"):
        z.assert_close(A[n].grad, f"{prefix}dA/{n}")
        z.assert_close(B[n].grad, f"{prefix}dB/{n}")
    if kind == "float":
        z.assert_close(mask.grad, prefix + "dmask")


@dtypes
@pytest.mark.parametrize("p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("where", ["noinst", "inst"])
def test_lp_losses_reproduce_the_golden_arrays(where, p, dtype):
    z = golden.Arrays("lp_sparsity", dtype)
    given = z[f"{where}/attributions"].requires_grad_()
    n_outputs = int(z.file["d_model_out"])
    z.assert_close(F.lp_weights(given, n_outputs, p), f"{where}/f64/p{p}/per_k")
    loss = F.lp_sparsity_loss(given, n_outputs, p)
    z.assert_close(loss, f"{where}/f64/p{p}/loss")
    loss.mean().backward()
    z.assert_close(given.grad, f"{where}/f64/p{p}/dattr")


@dtypes
@pytest.mark.parametrize("name", ["resid", "tms"])
def test_faithfulness_loss_reproduces_the_golden_arrays(name, dtype):
    z = golden.Arrays("param_match", dtype)
    layers = [n[: -len(".A")] for n in z.names(f"{name}/spd/") if n.endswith(".A")]
    leaves = {n: tuple(z[f"{name}/spd/{n}.{kind}"].requires_grad_() for kind in "AB") for n in layers}
    A, B = ({n: pair[i] for n, pair in leaves.items()} for i in range(2))
    W = {n: z[f"{name}/target/{n}.weight"] for n in layers}
    if name == "tms":  # a tied layer counts as often as it is used
        A["linear2"], B["linear2"], W["linear2"] = B["linear1"].mT, A["linear1"].mT, W["linear1"].mT
    loss = F.param_match_loss(A, B, W)
    z.assert_close(loss, f"{name}/f64/loss")
    z.assert_close(F.param_match_loss(A, B, W, int(z.file[f"{name}/n_params"])), f"{name}/f64/loss")
    loss.mean().backward()
    for n, (a, b) in leaves.items():
        z.assert_close(a.grad, f"{name}/f64/d/{n}.A")
        z.assert_close(b.grad, f"{name}/f64/d/{n}.B")


@dtypes
@pytest.mark.parametrize("where", ["noinst", "inst"])
def test_reconstructions_reproduce_the_golden_arrays(where, dtype):
    z = golden.Arrays("act_recon_and_recon_mse", dtype)
    ours, theirs = ({n: z[f"{where}/{kind}/{n}"] for n in ("l1", "l2")} for kind in ("layer", "target"))
    z.assert_close(F.act_recon_loss(ours, theirs), f"{where}/f64/act_recon")
    z.assert_close(F.recon_mse(ours["l2"], theirs["l2"]), f"{where}/f64/recon_mse_l2")


@dtypes
def test_unit_norm_reproduces_the_golden_arrays(dtype):
    z = golden.Arrays("unit_norm", dtype)
    A, grad = z["A"], z["grad"]
    F.unit_norm_(A)
    z.assert_close(A, "f64/A_unit")
    z.assert_close(F.tangent_gradient_(grad, A), "f64/grad_fixed")


@pytest.mark.parametrize("warmup", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "exponential"])
def test_lr_schedule_reproduces_the_golden_arrays(schedule, warmup):
    z = golden.Arrays("lr_schedule", torch.float64)
    steps, lr = int(z.file["steps"]), float(z.file["lr"])
    halflife = float(z.file["halflife"]) if schedule == "exponential" else None
    found = [F.lr_schedule(s, steps, lr, schedule, warmup, halflife) for s in range(steps + 1)]
    z.assert_close(torch.tensor(found, dtype=torch.float64), f"{schedule}/warmup{warmup}")


# ------------------------------------------------------------------------------------------- one table of every call

Call = tuple[Callable[..., Any], list[Tensor]]


def _calls(p: Problem) -> dict[str, Call]:
    """Every function with the tensors it takes; those it is differentiable in come first."""
    A, B, W, xs, gs, acts = _lists(p, "A", "B", "W", "xs", "gs", "acts")
    halves = lambda t: (list(t[:2]), list(t[2:4]))  # noqa: E731
    return {
        "batch_topk_mask": (lambda s: F.batch_topk_mask(s, 1.3), [p.scores]),
        "topk_mask": (lambda s: F.topk_mask(s, 2), [p.scores]),
        "grad_attributions": (lambda *t: F.grad_attributions(t[4:6], t[6:], *halves(t)), [*A, *B, *xs, *gs]),
        "activation_attributions": (lambda *t: F.activation_attributions(list(t[4:]), *halves(t)), [*A, *B, *xs]),
        "schatten_loss": (lambda *t: F.schatten_loss(*halves(t), t[4], 0.9, 10, 1e-3), [*A, *B, p.mask]),
        "schatten_loss_exact": (lambda *t: F.schatten_loss(*halves(t), t[4], 0.9, 10, 1e-3, True), [*A, *B, p.mask]),
        "schatten_loss_float": (lambda *t: F.schatten_loss(*halves(t), t[4], 0.9, 10, 1e-3), [*A, *B, p.weights]),
        "faithfulness_loss": (lambda *t: F.faithfulness_loss(*halves(t), list(t[4:])), [*A, *B, *W]),
        "lp_weights": (lambda a: F.lp_weights(a, 11, 0.9, 1e-3), [p.scores]),
        "lp_sparsity_loss": (lambda a: F.lp_sparsity_loss(a, 11, 0.9, 1e-3), [p.scores]),
        "recon_mse": (F.recon_mse, [p.output, p.target]),
        "recon_kl": (F.recon_kl, [p.output, p.target]),
        "act_recon_loss": (lambda *t: F.act_recon_loss(list(t[:2]), list(t[2:])), [*acts, *xs]),
        "masked_linear": (F.masked_linear, [xs[0], A[0], B[0], p.weights, p.bias]),
        "masked_linear_bool": (F.masked_linear, [xs[0], A[0], B[0], p.mask, p.bias]),
        "masked_linear_full": (F.masked_linear, [xs[0], A[0], B[0]]),
        "component_weights": (F.component_weights, [A[0], B[0]]),
        "component_sum": (F.component_sum, [A[0], B[0]]),
    }


CALLS = sorted(_calls(Problem(None)))
LOSSES = [n for n in CALLS if "loss" in n or n.startswith("recon")]
CONSTANT = {"batch_topk_mask": 1, "topk_mask": 1, "grad_attributions": 4}
"""How many of the tensors, the last ones, are constants."""

calls = pytest.mark.parametrize("name", CALLS)


def test_the_table_has_every_function():
    others = {
        "ablation_attributions",
        "lr_schedule",
        "output_gradients",
        "param_match_loss",
        "tangent_gradient_",
        "unit_norm_",
    }
    bases = {
        name.removesuffix("_exact").removesuffix("_float").removesuffix("_bool").removesuffix("_full") for name in CALLS
    }
    assert bases | others == set(F.__all__)


def _leaves(name: str, tensors: list[Tensor]) -> list[Tensor]:
    n = len(tensors) - CONSTANT.get(name, 0)
    return [t.detach().clone().requires_grad_(i < n and t.is_floating_point()) for i, t in enumerate(tensors)]


@calls
@axis
def test_functional_passes_gradcheck(name, n_instances):
    function, tensors = _calls(Problem(n_instances, batch=3))[name]
    leaves = _leaves(name, tensors)
    if not any(t.requires_grad for t in leaves):
        assert not function(*[t.requires_grad_(t.is_floating_point()) for t in leaves]).requires_grad
        return
    assert torch.autograd.gradcheck(function, leaves, raise_exception=True, fast_mode=True)


@calls
@axis
def test_functional_compiles_to_one_graph(name, n_instances):
    function, tensors = _calls(Problem(n_instances))[name]
    wanted_leaves, leaves = _leaves(name, tensors), _leaves(name, tensors)
    wanted = function(*wanted_leaves)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    found = torch.compile(function, fullgraph=True, backend=counter)(*leaves)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    if wanted.requires_grad:
        wanted.sum().backward()
        found.sum().backward()
        for one, other in zip(leaves, wanted_leaves, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_what_works_in_place_compiles_to_one_graph():
    A, grad = torch.randn(C, 7, RANK), torch.randn(C, 7, RANK)
    wanted_A = F.unit_norm_(A.clone())
    wanted = F.tangent_gradient_(grad.clone(), wanted_A)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda g, A: F.tangent_gradient_(g, F.unit_norm_(A)), fullgraph=True, backend=counter)
    assert torch.equal(step(grad, A), wanted)
    assert torch.equal(A, wanted_A) and torch.equal(grad, wanted)
    assert counter.frame_count == 1


def test_functional_compiles_for_batches_of_any_size():
    A, B = torch.randn(C, 7, RANK), torch.randn(C, RANK, 8)

    def run(x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        mask = F.batch_topk_mask(scores, 1.3)
        return F.masked_linear(x, A, B, mask), F.schatten_loss(A, B, mask, 0.9, 56)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for batch in (16, 9, 33):
        x, scores = torch.randn(batch, 7), torch.randn(batch, C)
        torch.testing.assert_close(compiled(x, scores), run(x, scores))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1  # torch may look twice at the product of k and the batch, but at the first call alone


@calls
@axis
def test_functional_takes_any_strides(name, n_instances):
    function, tensors = _calls(Problem(n_instances))[name]
    wanted = function(*tensors)
    reversed_axes = [
        t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))) for t in tensors
    ]
    every_other = [torch.stack([t, torch.zeros_like(t)], -1).flatten(-2)[..., ::2] for t in tensors]
    for others in (reversed_axes, every_other):
        assert any(not t.is_contiguous() for t in others)
        torch.testing.assert_close(function(*others), wanted, rtol=1e-12, atol=1e-12)


@calls
@axis
def test_functional_leaves_its_inputs_alone(name, n_instances):
    function, tensors = _calls(Problem(n_instances))[name]
    leaves = _leaves(name, tensors)
    before = [t.detach().clone() for t in leaves]
    found = function(*leaves)
    if found.requires_grad:
        found.sum().backward()
    for t, old in zip(leaves, before, strict=True):
        assert torch.equal(t, old) and t._version == 0


@calls
@axis
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_functional_takes_other_precisions(name, n_instances, dtype):
    torch.manual_seed(1)
    p = Problem(n_instances, dtype)
    torch.manual_seed(1)
    exact = Problem(n_instances)
    for field in ("A", "B", "W", "xs", "gs", "acts"):  # the same numbers, rounded
        setattr(exact, field, {n: t.double() for n, t in getattr(p, field).items()})
    for field in ("scores", "output", "target", "weights", "bias"):
        setattr(exact, field, getattr(p, field).double())
    exact.mask = p.mask
    function, tensors = _calls(p)[name]
    found, wanted = function(*tensors), _calls(exact)[name][0](*_calls(exact)[name][1])
    if found.dtype == torch.bool:
        assert torch.equal(found, wanted)
        return
    assert found.dtype == dtype
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error <= 8 * torch.finfo(dtype).eps, f"{error:.1e}"


@calls
@axis
def test_functional_is_untouched_by_autocast(name, n_instances):
    function, tensors = _calls(Problem(n_instances, torch.float32))[name]
    wanted = function(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(*tensors)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@calls
@axis
def test_functional_of_an_empty_batch(name, n_instances):
    p = Problem(n_instances, batch=0)
    function, tensors = _calls(p)[name]
    leaves = _leaves(name, tensors)
    found = function(*leaves)
    if name in LOSSES and name != "faithfulness_loss":
        assert torch.equal(found, torch.zeros(p.own, dtype=torch.float64))
        assert found.requires_grad
        found.sum().backward()
        for t in leaves:
            assert t.grad is None or torch.equal(t.grad, torch.zeros_like(t))
    elif name not in ("faithfulness_loss", "component_sum", "component_weights"):
        assert found.shape[0] == 0 and found.shape[1:-1] == p.own


def test_the_others_of_an_empty_batch():
    x = torch.zeros(0, 2, 3, requires_grad=True)
    assert F.output_gradients(x.square(), x).shape == (0, 2, 3, 3)
    assert F.ablation_attributions(lambda mask: x, x, 5).shape == (0, 2, 5)


@axis
def test_no_gradient_goes_into_a_mask(n_instances):
    p = Problem(n_instances)
    scores = p.scores.requires_grad_()
    mask = F.batch_topk_mask(scores, 1.0)
    assert mask.dtype == torch.bool and not mask.requires_grad
    x = p.xs["in"].requires_grad_()
    F.masked_linear(x, p.A["in"], p.B["in"], mask.to(x.dtype)).sum().backward()
    assert scores.grad is None and x.grad is not None
    mask = F.ablation_attributions(lambda m: x * m.sum(), x, C)
    assert not mask.requires_grad


def test_selection_and_mask_have_one_gradient():
    p = Problem(3)
    grads = []
    for as_selection in (False, True):
        x, A, B = (t.clone().requires_grad_() for t in (p.xs["in"], p.A["in"], p.B["in"]))
        mask: Any = F.batch_topk_mask(p.scores, 1.5)
        if as_selection:
            mask = ops.batch_topk(p.scores.transpose(0, 1), int(1.5 * BATCH))
        F.masked_linear(x, A, B, mask).square().sum().backward()
        grads.append((x.grad, A.grad, B.grad))
    for one, other in zip(*grads, strict=True):
        _close(one, other)


def test_layers_are_a_tensor_a_list_or_a_mapping():
    p = Problem(None)
    one = F.schatten_loss(p.A["in"], p.B["in"], p.mask, 0.9, 10)
    for wrap in (lambda t: [t], lambda t: (t,), lambda t: {"in": t}):
        assert torch.equal(F.schatten_loss(wrap(p.A["in"]), wrap(p.B["in"]), p.mask, 0.9, 10), one)


# ----------------------------------------------------------------------------------------------------------- bad inputs

f, i64 = torch.zeros, torch.zeros(2, 3, dtype=torch.int64)
A0, B0, A1, B1 = f(5, 7, 3), f(5, 3, 8), f(2, 5, 7, 3), f(2, 5, 3, 8)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "scores axes": (
        lambda: F.batch_topk_mask(f(3), 1),
        ValueError,
        "batch_topk_mask: scores must have shape [batch, n_components] or [batch, n_instances, n_components], got [3]",
    ),
    "scores integers": (
        lambda: F.topk_mask(i64, 1),
        TypeError,
        "topk_mask: scores must be float32, float64, float16 or bfloat16, got torch.int64",
    ),
    "scores list": (lambda: F.topk_mask([1.0], 1), TypeError, "topk_mask: scores must be a torch.Tensor, got list"),
    "k large": (
        lambda: F.batch_topk_mask(f(2, 3), 3.5),
        ValueError,
        "batch_topk_mask: k must be in [0, n_components=3], got 3.5",
    ),
    "k negative": (
        lambda: F.batch_topk_mask(f(2, 3), -0.1),
        ValueError,
        "batch_topk_mask: k must be in [0, n_components=3], got -0.1",
    ),
    "k nan": (
        lambda: F.batch_topk_mask(f(2, 3), math.nan),
        ValueError,
        "batch_topk_mask: k must be in [0, n_components=3], got nan",
    ),
    "k bool": (
        lambda: F.batch_topk_mask(f(2, 3), True),
        TypeError,
        "batch_topk_mask: k must be a number, got bool True",
    ),
    "k of samples": (lambda: F.topk_mask(f(2, 3), 4), ValueError, "topk_mask: k must be in [0, n_components=3], got 4"),
    "k of samples real": (lambda: F.topk_mask(f(2, 3), 1.5), TypeError, "topk_mask: k must be an int, got float 1.5"),
    "2**31 scores": (
        lambda: F.topk_mask(f(1, 1).expand(2**16, 2**15), 1),
        ValueError,
        "topk_mask: scores must have fewer than 2**31 entries an instance, got [65536, 32768]",
    ),
    "no layers": (
        lambda: F.grad_attributions([], [], [], []),
        ValueError,
        "grad_attributions: A must have at least one layer, got none",
    ),
    "other layers": (
        lambda: F.activation_attributions({"b": f(4, 7)}, {"a": A0}, {"a": B0}),
        ValueError,
        "activation_attributions: xs must have the layers of A, ['a'], got ['b']",
    ),
    "fewer layers": (
        lambda: F.activation_attributions([f(4, 7)], [A0, A0], [B0, B0]),
        ValueError,
        "activation_attributions: xs must have one tensor for each of the 2 layers, got 1",
    ),
    "a list for a mapping": (
        lambda: F.activation_attributions([f(4, 7)], {"a": A0}, {"a": B0}),
        TypeError,
        "activation_attributions: xs must be a mapping like A, got list",
    ),
    "a mapping for a list": (
        lambda: F.activation_attributions({"a": f(4, 7)}, [A0], [B0]),
        TypeError,
        "activation_attributions: xs must be a list like A, got dict",
    ),
    "a list for a tensor": (
        lambda: F.activation_attributions([f(4, 7)], A0, B0),
        TypeError,
        "activation_attributions: xs must be a torch.Tensor like A, got list",
    ),
    "no layers at all": (
        lambda: F.faithfulness_loss(None, B0, f(7, 8)),
        TypeError,
        "faithfulness_loss: A must be a tensor, a list or a mapping of them, got NoneType",
    ),
    "factors": (
        lambda: F.schatten_loss([A0], [f(5, 4, 8)], f(2, 5), 0.9, 10),
        ValueError,
        "schatten_loss: A[0] and B[0] must share rank, got A[0] [5, 7, 3] and B[0] [5, 4, 8]",
    ),
    "components of layers": (
        lambda: F.schatten_loss({"a": A0, "b": A0[:4]}, {"a": B0, "b": B0[:4]}, f(2, 5), 0.9, 10),
        ValueError,
        "schatten_loss: A['b'] must have the n_components of A['a'] [5, 7, 3], got [4, 7, 3]",
    ),
    "instances of layers": (
        lambda: F.schatten_loss([A1, A0], [B1, B0], f(2, 2, 5), 0.9, 10),
        ValueError,
        "schatten_loss: A[1] must have the n_instances and n_components of A[0] [2, 5, 7, 3], got [5, 7, 3]",
    ),
    "dtypes of layers": (
        lambda: F.schatten_loss([A0, A0.double()], [B0, B0.double()], f(2, 5), 0.9, 10),
        TypeError,
        "schatten_loss: A[1] must have the dtype of A[0], torch.float32, got torch.float64",
    ),
    "x axes": (
        lambda: F.grad_attributions(f(4, 7), f(4, 2, 8), A1, B1),
        ValueError,
        "grad_attributions: xs must have shape [batch, n_instances, d_in] like A [2, 5, 7, 3], got [4, 7]",
    ),
    "x instances": (
        lambda: F.grad_attributions(f(4, 3, 7), f(4, 3, 2, 8), A1, B1),
        ValueError,
        "grad_attributions: xs and A must share n_instances, got xs [4, 3, 7] and A [2, 5, 7, 3]",
    ),
    "x width": (
        lambda: F.grad_attributions(f(4, 6), f(4, 2, 8), A0, B0),
        ValueError,
        "grad_attributions: xs and A must share d_in, got xs [4, 6] and A [5, 7, 3]",
    ),
    "g width": (
        lambda: F.grad_attributions(f(4, 7), f(4, 2, 9), A0, B0),
        ValueError,
        "grad_attributions: gs and B must share d_out, got gs [4, 2, 9] and B [5, 3, 8]",
    ),
    "g batch": (
        lambda: F.grad_attributions(f(4, 7), f(3, 2, 8), A0, B0),
        ValueError,
        "grad_attributions: xs and gs must share batch, got xs [4, 7] and gs [3, 2, 8]",
    ),
    "n_outputs": (
        lambda: F.grad_attributions([f(4, 7)] * 2, [f(4, 2, 8), f(4, 3, 8)], [A0, A0], [B0, B0]),
        ValueError,
        "grad_attributions: gs[0] and gs[1] must share n_outputs, got gs[0] [4, 2, 8] and gs[1] [4, 3, 8]",
    ),
    "batch of layers": (
        lambda: F.activation_attributions([f(4, 7), f(5, 7)], [A0, A0], [B0, B0]),
        ValueError,
        "activation_attributions: xs[0] and xs[1] must share batch, got xs[0] [4, 7] and xs[1] [5, 7]",
    ),
    "x with a gradient": (
        lambda: F.grad_attributions(f(4, 7, requires_grad=True), f(4, 2, 8), A0, B0),
        NotImplementedError,
        "grad_attributions: xs must not require gradients, as it belongs to the target; detach it",
    ),
    "x dtype": (
        lambda: F.grad_attributions(f(4, 7).double(), f(4, 2, 8), A0, B0),
        TypeError,
        "grad_attributions: xs must have the dtype of A, torch.float32, got torch.float64",
    ),
    "output without a graph": (
        lambda: F.output_gradients(f(4, 2), f(4, 3)),
        ValueError,
        "output_gradients: layer_outputs must be in the graph of output, got a tensor without gradients; "
        "run the network under torch.enable_grad() and call .requires_grad_() on the first layer's output",
    ),
    "output of another layer": (
        lambda: F.output_gradients(f(4, 2, requires_grad=True) * 1, [f(4, 3, requires_grad=True)]),
        ValueError,
        "output_gradients: output must depend on layer_outputs[0], got one that does not",
    ),
    "output of other samples": (
        lambda: F.output_gradients(f(4, 2), [f(5, 3)]),
        ValueError,
        "output_gradients: layer_outputs[0] must have the samples of output, [4, d_out], got [5, 3]",
    ),
    "no outputs": (
        lambda: F.output_gradients(f(4, 0), f(4, 3)),
        ValueError,
        "output_gradients: output must have shape [batch, (n_instances,) n_outputs] with at least one output, "
        "got [4, 0]",
    ),
    "ablated shape": (
        lambda: F.ablation_attributions(lambda mask: f(4, 3), f(4, 2), 5),
        ValueError,
        "ablation_attributions: forward must return the shape of output, [4, 2], got [4, 3]",
    ),
    "ablated tuple": (
        lambda: F.ablation_attributions(lambda mask: (mask,), f(4, 2), 5),
        TypeError,
        "ablation_attributions: forward must return a torch.Tensor, got tuple",
    ),
    "n_components": (
        lambda: F.ablation_attributions(lambda mask: mask, f(4, 2), 2.0),
        TypeError,
        "ablation_attributions: n_components must be an int, got float 2.0",
    ),
    "mask shape": (
        lambda: F.schatten_loss(A0, B0, f(2, 4), 0.9, 10),
        ValueError,
        "schatten_loss: mask must have shape [batch, n_components] = [2, 5], got [2, 4]",
    ),
    "mask scalar": (
        lambda: F.schatten_loss(A0, B0, f(()), 0.9, 10),
        ValueError,
        "schatten_loss: mask must have shape [batch, n_components] = [batch, 5], got []",
    ),
    "mask with instances first": (
        lambda: F.schatten_loss(A1, B1, f(2, 4, 5).bool(), 0.9, 10),
        ValueError,
        "schatten_loss: mask must have shape [batch, n_instances, n_components] = [2, 2, 5], got [2, 4, 5]",
    ),
    "mask integers": (
        lambda: F.schatten_loss(A0, B0, f(2, 5).long(), 0.9, 10),
        TypeError,
        "schatten_loss: mask must be bool or of the dtype of A, torch.float32, got torch.int64",
    ),
    "mask dtype": (
        lambda: F.schatten_loss(A0, B0, f(2, 5).double(), 0.9, 10),
        TypeError,
        "schatten_loss: mask must have the dtype of A, torch.float32, got torch.float64",
    ),
    "mask none": (
        lambda: F.schatten_loss(A0, B0, None, 0.9, 10),
        TypeError,
        "schatten_loss: mask must be a torch.Tensor, got NoneType",
    ),
    "exact with weights": (
        lambda: F.schatten_loss(A0, B0, f(2, 5), 0.9, 10, exact=True),
        TypeError,
        "schatten_loss: mask must be bool when exact is true, got torch.float32",
    ),
    "p": (
        lambda: F.schatten_loss(A0, B0, f(2, 5), 0, 10),
        ValueError,
        "schatten_loss: p must be in (0, inf), got 0",
    ),
    "eps": (
        lambda: F.schatten_loss(A0, B0, f(2, 5), 1.0, 10, -1e-3),
        ValueError,
        "schatten_loss: eps must be in [0, inf), got -0.001",
    ),
    "n_params": (
        lambda: F.schatten_loss(A0, B0, f(2, 5), 1.0, 0),
        ValueError,
        "schatten_loss: n_params must be in (0, inf), got 0",
    ),
    "weights of nn.Linear": (
        lambda: F.faithfulness_loss(A0, B0, f(8, 7)),
        ValueError,
        "faithfulness_loss: weights must have the shape of the components' sum, [7, 8], got [8, 7]; "
        "transpose it, as nn.Linear stores [d_out, d_in]",
    ),
    "weights shape": (
        lambda: F.faithfulness_loss({"a": A1}, {"a": B1}, {"a": f(7, 8)}),
        ValueError,
        "faithfulness_loss: weights['a'] must have the shape of the components' sum, [2, 7, 8], got [7, 8]",
    ),
    "weights integers": (
        lambda: F.faithfulness_loss(A0, B0, f(7, 8).int()),
        TypeError,
        "faithfulness_loss: weights must be float32, float64, float16 or bfloat16, got torch.int32",
    ),
    "lp outputs": (
        lambda: F.lp_sparsity_loss(f(2, 5), 0, 1.0),
        ValueError,
        "lp_sparsity_loss: n_outputs must be in [1, 2**53], got 0",
    ),
    "lp p": (lambda: F.lp_weights(f(2, 5), 3, -1.0), ValueError, "lp_weights: p must be in (0, inf), got -1.0"),
    "outputs shape": (
        lambda: F.recon_mse(f(4, 2), f(4, 1)),
        ValueError,
        "recon_mse: target_output must have the shape of output, [4, 2], got [4, 1]",
    ),
    "outputs axes": (
        lambda: F.recon_mse(f(4), f(4)),
        ValueError,
        "recon_mse: output must have shape [batch, n_outputs] or [batch, n_instances, n_outputs], got [4]",
    ),
    "logits dtype": (
        lambda: F.recon_kl(f(4, 2), f(4, 2).half()),
        TypeError,
        "recon_kl: target_logits must have the dtype of logits, torch.float32, got torch.float16",
    ),
    "acts shape": (
        lambda: F.act_recon_loss([f(4, 2), f(4, 3)], [f(4, 2), f(4, 2)]),
        ValueError,
        "act_recon_loss: target_acts[1] must have the shape of acts[1], [4, 3], got [4, 2]",
    ),
    "acts batch": (
        lambda: F.act_recon_loss([f(4, 2), f(5, 3)], [f(4, 2), f(5, 3)]),
        ValueError,
        "act_recon_loss: acts[1] must have the batch and n_instances of acts[0] [4, 2], got [5, 3]",
    ),
    "layer x": (
        lambda: F.masked_linear(f(4, 6), A0, B0),
        ValueError,
        "masked_linear: x and A must share d_in, got x [4, 6] and A [5, 7, 3]",
    ),
    "layer x without instances": (
        lambda: F.masked_linear(f(7), A1, B1),
        ValueError,
        "masked_linear: x must have shape [.., n_instances, d_in] like A [2, 5, 7, 3], got [7]",
    ),
    "layer instances": (
        lambda: F.masked_linear(f(2, 4, 7), A1, B1),
        ValueError,
        "masked_linear: x and A must share n_instances, got x [2, 4, 7] and A [2, 5, 7, 3]",
    ),
    "layer mask": (
        lambda: F.masked_linear(f(4, 2, 7), A1, B1, f(2, 4, 5)),
        ValueError,
        "masked_linear: mask must have shape [.., n_instances, n_components] = [4, 2, 5], got [2, 4, 5]",
    ),
    "layer mask integers": (
        lambda: F.masked_linear(f(4, 7), A0, B0, f(4, 5).long()),
        TypeError,
        "masked_linear: mask must be bool or of the dtype of x, torch.float32, got torch.int64",
    ),
    "layer bias": (
        lambda: F.masked_linear(f(4, 2, 7), A1, B1, None, f(8)),
        ValueError,
        "masked_linear: bias must have shape [n_instances, d_out] = [2, 8], got [8]",
    ),
    "layer selection": (
        lambda: F.masked_linear(f(4, 7), A0, B0, ops.batch_topk(f(3, 5), 2)),
        ValueError,
        "masked_linear: mask.sample_offsets must be torch.int64 of shape [5] for 4 samples and 5 components, "
        "got torch.int64 [4]; use the result of fastapd.ops.batch_topk, instances first",
    ),
    "parts": (
        lambda: F.component_weights(A0, B1),
        ValueError,
        "component_weights: B must have shape [n_components, rank, d_out] like A, got A [5, 7, 3] and B [2, 5, 3, 8]",
    ),
    "unit norm axes": (
        lambda: F.unit_norm_(f(7, 3)),
        ValueError,
        "unit_norm_: A must have shape [n_components, d_in, rank] or [n_instances, n_components, d_in, rank], "
        "got [7, 3]",
    ),
    "unit norm integers": (
        lambda: F.unit_norm_(f(5, 7, 3).long()),
        TypeError,
        "unit_norm_: A must be float32, float64, float16 or bfloat16, got torch.int64",
    ),
    "tangent none": (
        lambda: F.tangent_gradient_(None, A0),
        TypeError,
        "tangent_gradient_: grad must be a torch.Tensor, got NoneType",
    ),
    "tangent shape": (
        lambda: F.tangent_gradient_(f(5, 3, 7), A0),
        ValueError,
        "tangent_gradient_: grad must have the shape of A, [5, 7, 3], got [5, 3, 7]",
    ),
    "step": (lambda: F.lr_schedule(11, 10, 1.0), ValueError, "lr_schedule: step must be in [0, steps=10], got 11"),
    "steps": (lambda: F.lr_schedule(0, 0, 1.0), ValueError, "lr_schedule: steps must be in [1, 2**53], got 0"),
    "lr": (lambda: F.lr_schedule(0, 10, 0.0), ValueError, "lr_schedule: lr must be in (0, inf), got 0.0"),
    "schedule": (
        lambda: F.lr_schedule(0, 10, 1.0, "step"),
        ValueError,
        "lr_schedule: schedule must be constant, linear, cosine or exponential, got 'step'",
    ),
    "warmup": (
        lambda: F.lr_schedule(0, 10, 1.0, warmup=1.0),
        ValueError,
        "lr_schedule: warmup must be in [0, 1), got 1.0",
    ),
    "halflife": (
        lambda: F.lr_schedule(0, 10, 1.0, "exponential"),
        ValueError,
        "lr_schedule: halflife must be given for the exponential schedule, got None",
    ),
    "halflife given": (
        lambda: F.lr_schedule(0, 10, 1.0, halflife=2),
        ValueError,
        "lr_schedule: halflife must be None for the constant schedule, got 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_functional_refuses(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_every_function_refuses_something():
    said = {message.partition(":")[0] for _, _, message in REFUSED.values()}
    assert said | {"component_sum", "param_match_loss"} == set(F.__all__)  # an op and an alias


@pytest.mark.parametrize("name", F.__all__)
def test_functional_docstrings_say_what_goes_in_and_out(name):
    function = getattr(F, name)
    doc = inspect.getdoc(function)
    assert doc is not None
    for section in ("Args", "Returns", "Raises"):
        assert f"\n{section}:\n" in doc, section
    listed = doc.split("\nArgs:\n")[1].split("\nReturns:\n")[0]
    for argument in inspect.signature(function).parameters:
        assert f"    {argument}: " in listed, argument
