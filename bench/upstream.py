"""The research code's formulation of every op and of the whole step, in our own words: the baseline of the ratios.

It says einsum by einsum what ApolloResearch/apd computes at commit 4e29d43, on activations [batch, n_instances, ..]
and factors A [n_instances, C, d_in, m], B [n_instances, C, m, d_out], each a parameter of its own: the weights and the
outputs of single components are materialised, the attributions loop in Python over the outputs of the target with one
`autograd.grad` each, the mask is a scatter after `topk`, the Schatten sum goes over [batch, C, m], and the forward of
all components always runs. The target is not detached: its parameters receive gradients that nobody reads. What
surrounds these lines there (hook points, einops, logging, plots) is left out; `bench/apd.py` runs the code itself, and
the benchmarks say how far the two are apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, einsum

Factors = dict[str, tuple[Tensor, Tensor]]
"""A and B of every layer by its name, in the order of the forward pass."""

Layer = Callable[[str, Tensor], Tensor]
"""(name, input) -> output of a decomposed layer."""

Network = Callable[[Layer, Tensor], Tensor]
"""A target with the decomposed layers left open."""


# ------------------------------------------------------------------------------------------------------------- networks


def tms(bias: Tensor) -> Network:
    """x' = ReLU(x W W^T + b) on [b, n, n_features]; b [n, n_features]."""

    def run(layer: Layer, x: Tensor) -> Tensor:
        return torch.relu(layer("linear2", layer("linear1", x)) + bias)

    return run


def residual_mlp(W_E: Tensor, W_U: Tensor, n_layers: int) -> Network:
    """ReLU layers on a residual stream, without biases."""

    def run(layer: Layer, x: Tensor) -> Tensor:
        r = einsum("bni,nio->bno", x, W_E)
        for i in range(n_layers):
            r = r + layer(f"layers.{i}.mlp_out", torch.relu(layer(f"layers.{i}.mlp_in", r)))
        return einsum("bni,nio->bno", r, W_U)

    return run


def mlp(n_layers: int) -> Network:
    """A chain of matrices with ReLU between them."""

    def run(layer: Layer, x: Tensor) -> Tensor:
        for i in range(n_layers):
            x = layer(f"layers.{i}", torch.relu(x) if i else x)
        return x

    return run


class Recorded(NamedTuple):
    """A target's output and what entered and left its decomposed layers."""

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def run_target(network: Network, x: Tensor, weights: dict[str, Tensor]) -> Recorded:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def layer(name: str, x: Tensor) -> Tensor:
        inputs[name] = x
        outputs[name] = einsum("bni,nio->bno", x, weights[name])
        return outputs[name]

    return Recorded(network(layer, x), inputs, outputs)


# ----------------------------------------------------------------------------------------------------------- operations


def component_weights(A: Tensor, B: Tensor) -> Tensor:
    """P_c = A_c B_c of every component, [n_instances, C, d_in, d_out]."""
    return einsum("ncim,ncmo->ncio", A, B)


def weight(A: Tensor, B: Tensor) -> Tensor:
    """The sum of the components in one einsum, [n_instances, d_in, d_out]."""
    return einsum("ncim,ncmo->nio", A, B)


def component_outputs(x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes every component on every sample and multiplies by the 0/1 mask [b, n, C]: [b, n, C, d_out]."""
    inner = einsum("bni,ncim->bncm", x, A)
    if mask is not None:
        inner = einsum("bncm,bnc->bncm", inner, mask)
    return einsum("bncm,ncmo->bnco", inner, B)


def component_forward(x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None = None) -> Tensor:
    """The sum over the components of their outputs, [b, n, d_out]."""
    return einsum("bnco->bno", component_outputs(x, A, B, mask))


def component_acts(inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each component's own matrix makes of the target's activations, [b, n, C, d_out] a layer."""
    return {name: einsum("bni,ncio->bnco", x.detach().clone(), weights[name]) for name, x in inputs.items()}


def _no_effect(acts: dict[str, Tensor]) -> Tensor:
    """Zeros [b, n, C]."""
    one = next(iter(acts.values()))
    return torch.zeros(one.shape[:-1], device=one.device)


def add_effects(total: Tensor, gradients: dict[str, Tensor], acts: dict[str, Tensor]) -> None:
    """Adds to [b, n, C] the squared first-order effect of every component on one output, summed over layers."""
    effect = torch.zeros_like(total)
    for name, g in gradients.items():
        effect += einsum("bno,bnco->bnc", g, acts[name])
    total += effect**2


def reduce_attributions(gradients: list[dict[str, Tensor]], acts: dict[str, Tensor]) -> Tensor:
    """The loop over outputs when their gradients are already there."""
    total = _no_effect(acts)
    for of_one_output in gradients:
        add_effects(total, of_one_output, acts)
    return total


def gradient_attributions(target: Recorded, weights: dict[str, Tensor]) -> Tensor:
    """Attributions [b, n, C] of a recorded target: for every output one backward pass and one contraction."""
    acts = component_acts(target.inputs, weights)
    wanted = list(target.outputs.values())
    total = _no_effect(acts)
    for o in range(target.output.shape[-1]):
        gradients = torch.autograd.grad(target.output[..., o].sum(), wanted, retain_graph=True)
        add_effects(total, dict(zip(target.outputs, gradients, strict=True)), acts)
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
    total = torch.zeros(mask.shape[1], device=mask.device)
    for A, B in factors.values():
        S_A = einsum("ncim,ncim->ncm", A, A)
        S_B = einsum("ncmo,ncmo->ncm", B, B)
        masked = einsum("ncm,bnc->bncm", S_A * S_B, mask)
        total = total + ((masked + 1e-16) ** (0.5 * p)).sum((0, -2, -1))
    return total / n_params / mask.shape[0]


def param_match(factors: Factors, targets: dict[str, Tensor], n_params: int) -> Tensor:
    """Squared distance of the summed components to the target's weights, layer by layer, [n_instances]."""
    total = torch.zeros((), device=next(iter(targets.values())).device)
    for name, (A, B) in factors.items():
        total = total + ((weight(A, B) - targets[name]) ** 2).sum((-2, -1))
    return total / n_params


def reconstruction(output: Tensor, target_output: Tensor) -> Tensor:
    """Mean squared error of each instance, [n_instances]."""
    return ((output - target_output) ** 2).mean((0, -1))


def activation_reconstruction(outputs: dict[str, Tensor], target_outputs: dict[str, Tensor]) -> Tensor:
    """Squared error after a ReLU over the given layers, by their widths, mean over samples, [n_instances]."""
    loss, width = torch.zeros(1, device=next(iter(outputs.values())).device), 0
    for name, y in outputs.items():
        loss = loss + ((torch.relu(target_outputs[name]) - torch.relu(y)) ** 2).sum(-1)
        width += y.shape[-1]
    return (loss / width).mean(0)


# ------------------------------------------------------------------------------------------------------- the whole step


class Result(NamedTuple):
    total: Tensor
    terms: dict[str, Tensor]
    attributions: Tensor
    mask: Tensor


class Step:
    """One training step in top-k form.

    Args:
        network: The target with its decomposed layers left open; `components` is the same with parameters that do not
            require gradients.
        weights: The target's matrices [n_instances, d_in, d_out] of the untied layers.
        factors: Initial A and B of the untied layers.
        ties: For each tied layer the one whose transpose it is.
        coefficients: By name of the term; those of "param_match", "topk_recon", "act_recon" and "schatten" that are 0
            are not computed.
        topk, p, lr: Active components per sample over the batch, Schatten exponent, learning rate of AdamW.
        unit_norm: Whether every column of A has unit norm.
    """

    def __init__(
        self,
        network: Network,
        components: Network,
        weights: dict[str, Tensor],
        factors: Factors,
        ties: dict[str, str],
        coefficients: dict[str, float],
        topk: float,
        p: float,
        lr: float,
        unit_norm: bool,
    ) -> None:
        self.network, self.components, self.ties = network, components, ties
        # the research code does not detach the target
        self.weights = {name: W.detach().clone().requires_grad_() for name, W in weights.items()}
        self.own = {
            name: tuple(t.detach().contiguous().clone().requires_grad_() for t in pair)
            for name, pair in factors.items()
        }
        self.coefficients, self.topk, self.p, self.lr, self.unit_norm = coefficients, topk, p, lr, unit_norm
        n_tied = {name: 1 + list(ties.values()).count(name) for name in weights}
        self.n_params = sum(n_tied[name] * W[0].numel() for name, W in weights.items())
        self.optimiser = torch.optim.AdamW([t for pair in self.own.values() for t in pair], lr=lr, weight_decay=0.0)

    def factors(self) -> Factors:
        tied = {
            name: (self.own[o][1].transpose(-2, -1), self.own[o][0].transpose(-2, -1)) for name, o in self.ties.items()
        }
        return {**{name: (A, B) for name, (A, B) in self.own.items()}, **tied}

    def targets(self) -> dict[str, Tensor]:
        return {**self.weights, **{name: self.weights[o].transpose(-2, -1) for name, o in self.ties.items()}}

    def run_components(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """The output, every layer's output, and every layer's components' outputs, which a cache keeps alive there."""
        factors, cached = self.factors(), []
        outputs: dict[str, Tensor] = {}

        def layer(name: str, x: Tensor) -> Tensor:
            cached.append(component_outputs(x, *factors[name], mask))
            outputs[name] = einsum("bnco->bno", cached[-1])
            return outputs[name]

        return self.components(layer, x), outputs, cached

    def normalise(self) -> None:
        for A, _ in self.own.values():
            A.data /= A.data.norm(p=2, dim=-2, keepdim=True)

    def make_tangential(self) -> None:
        """Takes from every gradient of A the part along A."""
        for A, _ in self.own.values():
            assert A.grad is not None
            along = einsum("ncim,ncim->ncm", A.grad, A.data)
            A.grad -= einsum("ncm,ncim->ncim", along, A.data)

    def __call__(self, x: Tensor) -> Result:
        if self.unit_norm:
            self.normalise()
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr
        self.optimiser.zero_grad(set_to_none=True)
        wanted = self.coefficients
        target = run_target(self.network, x, self.targets())
        full, _, _cached = self.run_components(x)
        terms = {"out_recon": reconstruction(full, target.output)}  # computed whether or not it has a coefficient
        terms["param_match"] = param_match(self.factors(), self.targets(), self.n_params)
        weights = {name: component_weights(A, B) for name, (A, B) in self.factors().items()}
        attributions = gradient_attributions(target, weights)
        mask = topk_mask(attributions, self.topk)
        output, outputs, _cached_topk = self.run_components(x, mask)
        terms["topk_recon"] = reconstruction(output, target.output)
        if wanted.get("act_recon"):
            hidden = {name: y for name, y in outputs.items() if name.endswith("mlp_in")}
            terms["act_recon"] = activation_reconstruction(hidden, target.outputs)
        terms["schatten"] = schatten(self.factors(), mask, self.p, self.n_params)
        total = torch.zeros((), device=x.device)
        for name, coefficient in wanted.items():
            if coefficient:
                total = total + coefficient * terms[name].mean()
        total.backward()
        if self.unit_norm:
            self.make_tangential()
        self.optimiser.step()
        return Result(total, terms, attributions, mask)
