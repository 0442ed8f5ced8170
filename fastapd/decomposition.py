"""The result: a target with its components, however they were made; run it, look at it, save it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastapd.evaluation import Step, evaluate
from fastapd.model import ComponentModel, Record
from fastapd.ops import Selection

if TYPE_CHECKING:
    from jaxtyping import Float

    from fastapd._rundir import RunDirectory
    from fastapd.config import APD


class Decomposition:
    """A target, its components and the method that selects among them.

    Args:
        model: The target with its components.
        method: How components are attributed and selected.

    Attributes:
        history: The rows of metrics of the run that made it, oldest first; empty if none did.
    """

    def __init__(self, model: ComponentModel, method: APD) -> None:
        self.model, self.method = model, method
        self.history: list[dict[str, Any]] = []

    @torch.no_grad()
    def __call__(self, x: Tensor, active: Sequence[int] | Selection | Tensor | None = None) -> Tensor:
        """The target's output when it runs on component sums.

        Args:
            x: The target's input.
            active: Indices of the components that are on for every sample; or a `Selection`; or a mask
                [n_instances, batch, C]; None for all.
        """
        components = self.model.components
        if isinstance(active, Selection) or active is None or isinstance(active, Tensor):
            return self.model.forward(x, active).output
        wrong = [c for c in active if not 0 <= c < components.n_components]
        if wrong:
            raise ValueError(f"Decomposition: active must be in [0, {components.n_components}), got {wrong}")
        site = self.model.sites[0]
        rows = site.weight.new_zeros(components.n_instances, 1, components.n_components)
        rows[:, :, list(active)] = 1.0
        # One row of the mask an instance, seen by every sample of the batch.
        return self.model.forward(x, rows).output

    def parts(self, layer: str) -> Float[Tensor, "I C d_in d_out"]:
        """Each component's own matrix in a layer, detached."""
        return self.model.components.parts(layer).detach()

    @torch.no_grad()
    def select(self, x: Tensor) -> tuple[Step, Record]:
        """What the method selects on a batch (attributions, mask, counts), and the forward pass of it."""
        step = evaluate(self.model, self.method, x)
        return step, self.model.forward(x, step.selection, step.always_on)

    @torch.no_grad()
    def score(self, x: Tensor) -> dict[str, Float[Tensor, " I"]]:
        """What can be said of any decomposition without training, one value an instance.

        Args:
            x: A batch of the target's inputs.

        Returns:
            `faithfulness_error`, ‖sum of components − W‖ / ‖W‖ over all layers; `topk_mse`, the error of the output
            with the method's selection; `full_mse`, with all components on; `l0`, active components a sample; `alive`,
            components that some sample uses.
        """
        from fastapd import losses, metrics

        rows = self.model.to_instances
        target = rows(self.model.record_target(x).output)
        step, masked = self.select(x)
        weights = self.model.weights
        return {
            "faithfulness_error": metrics.relative_faithfulness(
                weights, {name: self.model.components.weight(name) for name in weights}
            ),
            "topk_mse": losses.reconstruction(rows(masked.output), target),
            "full_mse": losses.reconstruction(rows(self.model.forward(x).output), target),
            "l0": metrics.l0(step.counts, step.attributions.shape[1]),
            "alive": metrics.alive(step.counts),
        }

    def save(self, run: RunDirectory) -> None:
        """Writes `components.safetensors` and `target.safetensors` into a run directory."""
        ties = self.model.components.ties
        run.save_tensors(
            "components.safetensors",
            self.model.components.export(),
            {"format": "fastapd-components-1", "ties": ",".join(f"{a}={b}" for a, b in ties.items())},
        )
        state = {name: t.detach() for name, t in self.model.target.state_dict().items()}
        run.save_tensors("target.safetensors", state, {"format": "fastapd-target-1"})

    def __repr__(self) -> str:
        return f"Decomposition({self.model.components.extra_repr()})"
