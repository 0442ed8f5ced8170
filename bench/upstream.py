"""The research code's formulation of every op and of the whole step, in our own words: the baseline of the ratios.

It says einsum by einsum what ApolloResearch/apd computes at commit 4e29d43, on activations [batch, n_instances, ..]
and factors A [n_instances, C, d_in, m], B [n_instances, C, m, d_out], each a parameter of its own: the weights and the
outputs of single components are materialised, the attributions loop in Python over the outputs of the target with one
`autograd.grad` each, the mask is a scatter after `topk`, the Schatten sum goes over [batch, C, m], and the forward of
all components always runs. What surrounds these lines there (hook points, einops, logging, plots) is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, einsum

Factors = dict[str, tuple[Tensor, Tensor]]
"""A and B of every layer by its name."""


def component_weights(A: Tensor, B: Tensor) -> Tensor:
    """P_c = A_c B_c of every component, [n_instances, C, d_in, d_out]."""
    return einsum("ncim,ncmo->ncio", A, B)


def weight(A: Tensor, B: Tensor) -> Tensor:
    """The sum of the components in one einsum, [n_instances, d_in, d_out]."""
    return einsum("ncim,ncmo->nio", A, B)


def component_forward(x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes every component on every sample, multiplies by the 0/1 mask [b, n, C], and sums their outputs."""
    inner = einsum("bni,ncim->bncm", x, A)
    if mask is not None:
        inner = inner * mask[..., None]
    outputs = einsum("bncm,ncmo->bnco", inner, B)
    return outputs.sum(-2)


def component_acts(inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each component's own matrix makes of the target's activations, [b, n, C, d_out] a layer."""
    return {name: einsum("bni,ncio->bnco", x.detach(), weights[name]) for name, x in inputs.items()}


def output_effects(gradients: dict[str, Tensor], acts: dict[str, Tensor]) -> Tensor:
    """The first-order effect of every component on one output, summed over layers: [b, n, C]."""
    effect: Tensor | None = None
    for name, g in gradients.items():
        term = einsum("bno,bnco->bnc", g, acts[name])
        effect = term if effect is None else effect + term
    assert effect is not None
    return effect


def reduce_attributions(gradients: list[dict[str, Tensor]], acts: dict[str, Tensor]) -> Tensor:
    """The loop over outputs when their gradients are already there."""
    total: Tensor | None = None
    for of_one_output in gradients:
        squared = output_effects(of_one_output, acts) ** 2
        total = squared if total is None else total + squared
    assert total is not None
    return total


class Recorded(NamedTuple):
    """A target's output and what entered and left its decomposed layers."""

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def run_tms(x: Tensor, weights: dict[str, Tensor], bias: Tensor) -> Recorded:
    """x' = ReLU(x W W^T + b) on [b, n, n_features]."""
    hidden = einsum("bni,nio->bno", x, weights["linear1"])
    before = einsum("bni,nio->bno", hidden, weights["linear2"])
    inputs, outputs = {"linear1": x, "linear2": hidden}, {"linear1": hidden, "linear2": before}
    return Recorded(torch.relu(before + bias), inputs, outputs)


def run_residual_mlp(x: Tensor, W_E: Tensor, W_U: Tensor, weights: dict[str, Tensor]) -> Recorded:
    """One ReLU layer on the residual stream, without biases; `weights` holds its two matrices in order."""
    (name_in, W_in), (name_out, W_out) = weights.items()
    r = einsum("bni,nio->bno", x, W_E)
    before = einsum("bni,nio->bno", r, W_in)
    h = torch.relu(before)
    y = einsum("bni,nio->bno", h, W_out)
    output = einsum("bni,nio->bno", r + y, W_U)
    return Recorded(output, {name_in: r, name_out: h}, {name_in: before, name_out: y})


def gradient_attributions(target: Recorded, weights: dict[str, Tensor]) -> Tensor:
    """Attributions [b, n, C] of a recorded target: for every output one backward pass and one contraction."""
    acts = component_acts(target.inputs, weights)
    wanted = list(target.outputs.values())
    total: Tensor | None = None
    for o in range(target.output.shape[-1]):
        gradients = torch.autograd.grad(target.output[..., o].sum(), wanted, retain_graph=True)
        squared = output_effects(dict(zip(target.outputs, gradients, strict=True)), acts) ** 2
        total = squared if total is None else total + squared
    assert total is not None
    return total


def topk_mask(scores: Tensor, topk: float) -> Tensor:
    """True at the int(topk * batch) largest scores of each instance, [b, n, C]."""
    batch, n_instances, n_components = scores.shape
    flat = scores.transpose(0, 1).reshape(n_instances, -1)
    indices = flat.topk(int(topk * batch), dim=-1).indices
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, indices, True)
    return mask.view(n_instances, batch, n_components).transpose(0, 1)


def schatten(factors: Factors, mask: Tensor, p: float, n_params: int) -> Tensor:
    """sum over layers, samples, components and ranks of (mask ‖a‖² ‖b‖² + 1e-16)^{p/2}, [n_instances]."""
    batch = mask.shape[0]
    total: Tensor | None = None
    for A, B in factors.values():
        S_A = einsum("ncim,ncim->ncm", A, A)
        S_B = einsum("ncmo,ncmo->ncm", B, B)
        masked = einsum("bnc,ncm->bncm", mask.to(A.dtype), S_A * S_B)
        term = ((masked + 1e-16) ** (p / 2)).sum((-2, -1)).sum(0)
        total = term if total is None else total + term
    assert total is not None
    return total / n_params / batch


def param_match(factors: Factors, targets: dict[str, Tensor], n_params: int) -> Tensor:
    """Squared distance of the summed components to the target's weights, layer by layer, [n_instances]."""
    total: Tensor | None = None
    for name, (A, B) in factors.items():
        term = ((weight(A, B) - targets[name]) ** 2).sum((-2, -1))
        total = term if total is None else total + term
    assert total is not None
    return total / n_params


def reconstruction(output: Tensor, target_output: Tensor) -> Tensor:
    """Mean squared error of each instance, [n_instances]."""
    return ((output - target_output) ** 2).mean((0, -1))


class Result(NamedTuple):
    total: Tensor
    terms: dict[str, Tensor]
    attributions: Tensor
    mask: Tensor


class TMSStep:
    """One training step on a toy model of superposition, x' = ReLU(x W W^T + b), with tied layers.

    Args:
        weight: The target's W [n_instances, n_features, n_hidden].
        bias: The target's b [n_instances, n_features].
        A, B: Initial factors of the first layer; those of the second are their transposes.
        topk: Active components per sample, on average over a batch.
        p: Exponent of the Schatten term.
        coefficients: Of "param_match", "topk_recon" and "schatten".
        lr: Learning rate of AdamW.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        A: Tensor,
        B: Tensor,
        *,
        topk: float,
        p: float,
        coefficients: dict[str, float],
        lr: float,
    ) -> None:
        self.target_weight = weight.detach().clone().requires_grad_()  # the research code does not detach the target
        self.bias = bias.detach().clone()
        self.A = A.detach().contiguous().clone().requires_grad_()
        self.B = B.detach().contiguous().clone().requires_grad_()
        self.topk, self.p, self.coefficients, self.lr = topk, p, coefficients, lr
        self.n_params = 2 * weight[0].numel()
        self.optimiser = torch.optim.AdamW([self.A, self.B], lr=lr, weight_decay=0.0)

    def factors(self) -> Factors:
        return {"linear1": (self.A, self.B), "linear2": (self.B.transpose(-2, -1), self.A.transpose(-2, -1))}

    def targets(self) -> dict[str, Tensor]:
        return {"linear1": self.target_weight, "linear2": self.target_weight.transpose(-2, -1)}

    def run_components(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for A, B in self.factors().values():
            x = component_forward(x, A, B, mask)
        return torch.relu(x + self.bias)

    def __call__(self, x: Tensor) -> Result:
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr
        self.optimiser.zero_grad(set_to_none=True)
        target = run_tms(x, self.targets(), self.bias)
        full = self.run_components(x)
        terms = {
            "param_match": param_match(self.factors(), self.targets(), self.n_params),
            "out_recon": reconstruction(full, target.output),  # computed whether or not it has a coefficient
        }
        weights = {name: component_weights(A, B) for name, (A, B) in self.factors().items()}
        attributions = gradient_attributions(target, weights)
        mask = topk_mask(attributions, self.topk)
        terms["topk_recon"] = reconstruction(self.run_components(x, mask), target.output)
        terms["schatten"] = schatten(self.factors(), mask, self.p, self.n_params)
        total = x.new_zeros(())
        for name, coefficient in self.coefficients.items():
            total = total + coefficient * terms[name].mean()
        total.backward()
        self.optimiser.step()
        return Result(total, terms, attributions, mask)
