"""How good a decomposition is, without training, and beside baselines that know nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastapd._masks import refuse
from fastapd.components import Components
from fastapd.evaluation import Step, evaluate
from fastapd.model import ComponentModel, Record
from fastapd.spectra import effective_rank

if TYPE_CHECKING:
    from jaxtyping import Float

    from fastapd.config import APD

BASELINES = ("random", "svd", "copies")
"""In the order of the tables; see `baseline`."""


class Scores:
    """The part of a `Decomposition` that attributes, selects and measures."""

    model: ComponentModel
    method: APD
    last_batch: Any = None
    """The batch that `metrics` uses when it is given none: the last one of the training that made this."""

    @torch.no_grad()
    def select(self, x: Any) -> tuple[Step, Record]:
        """What the method selects on a batch, and the forward pass of it.

        Args:
            x: A batch of the target's inputs.

        Returns:
            The `Step` (attributions, selection, mask, counts, terms of the loss), and the `Record` of the component
            model on that selection (output, and every layer's inputs and outputs).
        """
        step = evaluate(self.model, self.method, x)
        return step, self.model.forward(x, step.selection, step.always_on)

    @torch.no_grad()
    def attributions(self, x: Any) -> Float[Tensor, "I b C"]:
        """How much each component matters on each sample, by the method's measure.

        Args:
            x: A batch of the target's inputs; with further axes of samples, every position is a sample.

        Returns:
            [n_instances, batch, C], larger is more; for "gradient" `Σ_o (Σ_l ⟨∂f_o/∂W_l, P_c,l⟩)²`.
        """
        weightless = {name: 0.0 for name in ("faithfulness", "minimality", "simplicity", "lp_sparsity")}
        terms = {"output_reconstruction": 0.0, "activation_reconstruction": 0.0}
        return evaluate(self.model, self.method.model_copy(update=weightless | terms), x).attributions

    @torch.no_grad()
    def score(self, x: Any) -> dict[str, Float[Tensor, " I"]]:
        """What can be said of any decomposition without training, one value an instance.

        Args:
            x: A batch of the target's inputs.

        Returns:
            `faithfulness_error`, ‖sum of components − W‖ / ‖W‖ over all layers; `topk_mse`, the error of the output
            with the method's selection; `full_mse`, with all components on and no residual; `l0`, active components a
            sample; `alive`, components that some sample uses.
        """
        from fastapd import losses, metrics

        rows = self.model.to_instances
        target = rows(self.model.record_target(x).output)
        step, masked = self.select(x)
        return {
            "faithfulness_error": faithfulness_error(self.model),
            "topk_mse": losses.reconstruction(rows(masked.output), target),
            "full_mse": losses.reconstruction(rows(self.model.forward(x).output), target),
            "l0": metrics.l0(step.counts, step.attributions.shape[1]),
            "alive": metrics.alive(step.counts),
        }

    def metrics(self, x: Any = None, baselines: bool | Sequence[str] = True, seed: int = 0) -> dict[str, Any]:
        """Faithful, minimal, simple: the numbers of a decomposition, beside those of baselines on the same batch.

        Args:
            x: A batch of the target's inputs; None for the last one of the training that made this.
            baselines: True for all, False for none, or some of "random" (untrained components), "svd" (component c is
                the c-th term σ u vᵀ of each layer's SVD) and "copies" (every component is W / C). They have the same
                C and the same method.
            seed: Of the random components.

        Returns:
            A dict of plain numbers, or of lists with one an instance:
            "faithfulness", `√Σ_l ‖Σ_c P_c,l − W_l‖² / √Σ_l ‖W_l‖²`;
            "reconstruction", the method's distance between the output with its selection and the target's;
            "reconstruction_all", that with all components on and no residual;
            "l0", active components a sample; "alive", components that some sample uses;
            "effective_rank", averaged over layers and components larger than 1e-6 of the layer;
            "active_set_bits", `Σ_c h(q_c)`, q_c being the share of samples that use c and h the entropy of a coin in
            bits: what it takes to say which components a sample uses, if they came independently;
            and "baselines", a dict of such dicts, unless there are none.

        Raises:
            ValueError: x is None and no training left a batch, or an unknown baseline.
        """
        if x is None:
            x = self.last_batch
        if x is None:
            hint = "pass a batch of the target's inputs, as decompose was given"
            raise ValueError(refuse("x", "be given unless a training left its last batch here", None, hint))
        chosen = (BASELINES if baselines else ()) if isinstance(baselines, bool) else tuple(baselines)
        unknown = [name for name in chosen if name not in BASELINES]
        if unknown:
            raise ValueError(refuse("baselines", f"be among {', '.join(BASELINES)}", unknown))
        found = _measure(self.model, self.method, x)
        if chosen:
            found["baselines"] = {name: _measure(baseline(self.model, name, seed), self.method, x) for name in chosen}
        return found


@torch.no_grad()
def faithfulness_error(model: ComponentModel) -> Float[Tensor, " I"]:
    """‖sum of components − W‖ / ‖W‖ over all layers."""
    from fastapd import metrics

    weights = model.weights
    return metrics.relative_faithfulness(weights, {name: model.components.weight(name) for name in weights})


def baseline(model: ComponentModel, name: str, seed: int = 0) -> ComponentModel:
    """The same target with components that know nothing of its features: "random", "svd" or "copies"."""
    from fastapd import metrics
    from fastapd._random import stream

    own = model.components
    ties = own.ties
    weights = {layer: W for layer, W in model.weights.items() if layer not in ties}
    like = next(iter(weights.values()))
    if name == "random":
        generator = stream(seed, "random baseline")
        sizes = own.n_components, own.rank, own.n_instances
        components = Components(own.layers, *sizes, generator=generator, dtype=like.dtype, device=like.device)
    elif name == "svd":
        given = {layer: metrics.svd_factors(W, own.n_components, 1) for layer, W in weights.items()}
        components = Components.from_factors(given, ties)
    else:
        rank = max(min(W.shape[1:]) for W in weights.values())
        given = {layer: metrics.copies_factors(W, own.n_components, rank) for layer, W in weights.items()}
        components = Components.from_factors(given, ties)
    return ComponentModel(model.target, model.sites, components, model.take_output)


@torch.no_grad()
def _measure(model: ComponentModel, method: APD, x: Any) -> dict[str, Any]:
    from fastapd import losses, metrics
    from fastapd.interventions import plain
    from fastapd.ops import component_svdvals

    distance, rows = losses.DISTANCES[method.distance], model.to_instances
    target = rows(model.record_target(x).output)
    step = evaluate(model, method, x)
    masked = model.forward(x, step.selection, step.always_on)
    batch = step.attributions.shape[1]
    share = step.counts.double() / max(batch, 1)  # [I, C]
    bits = (torch.special.entr(share) + torch.special.entr(1 - share)).sum(-1) / torch.tensor(2.0).log().item()
    ranks = []
    for name in model.components.multiplicity:
        values = component_svdvals(*model.components.factors(name))  # [I, C, m]
        least = metrics.DEAD_BELOW * model.weights[name].flatten(1).norm(dim=-1)[:, None]
        ranks.append(torch.where(values.norm(dim=-1) > least, effective_rank(values), 0.0))
    rank = torch.cat(ranks, -1)
    found = {
        "faithfulness": faithfulness_error(model),
        "reconstruction": distance(rows(masked.output), target),
        "reconstruction_all": distance(rows(model.forward(x).output), target),
        "l0": metrics.l0(step.counts, batch),
        "alive": metrics.alive(step.counts),
        "effective_rank": rank.sum(-1) / (rank > 0).sum(-1).clamp(min=1),
        "active_set_bits": bits,
    }
    return {name: plain(value) for name, value in found.items()}
