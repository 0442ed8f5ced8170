"""One training step from the strongest plain torch forms: what a careful user gets without native code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import plain, plain_attributions
from bench.cases import Problem, method

Attributions = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""(x, Ats, Bs) -> [I, b, C]."""


def tangent_attributions(p: Problem) -> Attributions:
    """The form written by hand for the architecture of a problem."""
    target, weights = p.model.target, p.weights
    if p.case.target == "tms":
        bias = target.get_parameter("b_final")
        return lambda x, Ats, Bs: plain_attributions.tms_tangent(x, weights[0], bias, Ats[0], Bs[0])
    if p.case.target == "mlp":
        return lambda x, Ats, Bs: plain_attributions.chain_tangent(x, weights, Ats, Bs)
    W_E, W_U = target.get_buffer("W_E"), target.get_buffer("W_U")
    return lambda x, Ats, Bs: plain_attributions.residual_tangent(x, W_E, W_U, weights, Ats, Bs)


def reverse_attributions(p: Problem) -> Attributions:
    """From the gradients of the outputs, for any architecture."""
    form = plain_attributions.stacked if p.case.target == "tms" else plain_attributions.factored

    def function(x: Tensor, Ats: Sequence[Tensor], Bs: Sequence[Tensor]) -> Tensor:
        with torch.enable_grad():
            record = p.model.record_target(x, differentiable=True)
            gradients = plain_attributions.output_gradients(record.output, [record.outputs[name] for name in p.names])
        return form([record.inputs[name] for name in p.names], gradients, Ats, Bs)

    return function


class Step:
    """One training step in top-k form, with a fused optimiser.

    Args:
        p: A TMS or a residual MLP with its initial factors.
        attributions: How they are computed.
    """

    def __init__(self, p: Problem, attributions: Attributions) -> None:
        self.p, self.attributions, self.method = p, attributions, method(p.case)
        self.own = 1 if p.case.tied else len(p.names)  # a tied layer has the factors of the first with roles swapped
        new = [t.detach().clone(memory_format=torch.contiguous_format) for t in (*p.Ats[: self.own], *p.Bs[: self.own])]
        self.At, self.B = new[: self.own], new[self.own :]
        for t in new:
            t.requires_grad_()
        self.n_params = sum(W[0].numel() for W in p.weights)
        self.optimiser = torch.optim.AdamW(new, lr=0.0, weight_decay=0.0, fused=True)

    def layers(self) -> tuple[list[Tensor], list[Tensor]]:
        """At and B of every layer."""
        return (self.At + self.B, self.B + self.At) if self.p.case.tied else (self.At, self.B)

    def forward(self, x: Tensor, layer: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The output, and the hidden activations that are compared."""
        target, hidden = self.p.model.target, []
        if self.p.case.tied:
            return (layer(1, layer(0, x)) + target.get_parameter("b_final")).relu(), hidden
        if self.p.case.target == "mlp":
            for i in range(self.p.case.n_layers):
                x = layer(i, x.relu() if i else x)
            return x, hidden
        r = x @ target.get_buffer("W_E")
        for j in range(self.p.case.n_layers):
            hidden.append(layer(2 * j, r).relu())
            r = r + layer(2 * j + 1, hidden[-1])
        return r @ target.get_buffer("W_U"), hidden

    def terms(self, x: Tensor, rows: Tensor) -> list[Tensor]:
        """Faithfulness, minimality, simplicity, and the hidden activations if they have a coefficient."""
        batch, (Ats, Bs) = x.shape[1], self.layers()
        with torch.no_grad():
            output, hidden = self.forward(x, lambda i, h: h @ self.p.weights[i])
        masked, approximate = self.forward(x, lambda i, h: plain.forward_rows(h, Ats[i], Bs[i], rows))
        counts, uses = plain.counts_of_rows(rows, batch), len(Ats) // self.own
        layers = list(zip(self.At, self.B, self.p.weights, strict=False))
        faithfulness = sum(plain.component_sum_loss(At, B, W) for At, B, W in layers)
        simplicity = sum(plain.schatten(At, B, counts, batch, self.method.p) for At, B, _ in layers)
        terms = [
            faithfulness * (uses / self.n_params),
            (masked - output).square().mean((-2, -1)),
            simplicity * (uses / (self.n_params * batch)),
        ]
        if self.method.activation_reconstruction:
            error = sum((a - h).square().sum((-2, -1)) for a, h in zip(approximate, hidden, strict=True))
            terms.append(error / (batch * sum(h.shape[-1] for h in hidden)))
        return terms

    @torch.no_grad()
    def normalise(self) -> None:
        for At in self.At:
            plain.unit_norm(At)

    @torch.no_grad()
    def make_tangential(self) -> None:
        for At in self.At:
            assert At.grad is not None
            plain.remove_along(At.grad, At)

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """The total, the terms, the attributions and the rows of the selection."""
        settings = self.method
        if settings.unit_norm:
            self.normalise()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            scores = self.attributions(x, *self.layers())
        rows = plain.topk_rows(scores, self.p.case.n_pairs)
        terms = self.terms(x, rows)
        coefficients = (settings.faithfulness, settings.minimality, settings.simplicity)
        coefficients += (settings.activation_reconstruction,) if settings.activation_reconstruction else ()
        total = sum((c * term.mean() for c, term in zip(coefficients, terms, strict=True)), x.new_zeros(()))
        total.backward()
        if settings.unit_norm:
            self.make_tangential()
        self.optimiser.step()
        return total, terms, scores, rows
