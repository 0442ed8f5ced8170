"""What a decomposition's target computes without some of its components: ablations, their losses, and paths.

Ablation puts something else in a component's place. With weights g of the components that are kept (0 or 1, or any
number between), a layer with input x computes `Σ_c g_c x P_c + Σ_c (1 − g_c) z_c`, where z_c stands in for x P_c:

    zero         z_c = 0
    mean         z_c = mean of x P_c over a reference batch
    resample     z_c = x' P_c, x' being the layer's input on another sample
    half         z_c = r_c x P_c, each r_c 0 or 1 with probability 1/2: the scrubbing of the APD paper
    partial      z_c = r_c x P_c, each r_c drawn from U[0, 1]
    adversarial  z_c = r_c x P_c, the r_c in [0, 1] that move the output furthest, as far as gradient ascent finds them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastapd import _masks
from fastapd._masks import Layer, refuse
from fastapd._random import stream
from fastapd.model import Call, ComponentModel
from fastapd.ops import component_forward

if TYPE_CHECKING:
    from fastapd.config import APD
    from fastapd.evaluation import Distance

HOW = ("zero", "mean", "resample", "half", "partial", "adversarial")
"""The ways to ablate, in the order of the tables."""


class PathEffect(NamedTuple):
    """How the output changes without some components, each of the shape of the output; `total = direct + indirect`.

    Attributes:
        total: f(x) − f(x without them): later layers see what follows from their absence.
        direct: The same while every later decomposed layer still sees what it saw before.
        indirect: What goes through later decomposed layers: total − direct.
    """

    total: Tensor
    direct: Tensor
    indirect: Tensor


class Interventions:
    """The part of a `Decomposition` that takes components away."""

    model: ComponentModel
    method: APD

    def ablate(
        self,
        x: Any,
        keep: Any = None,
        *,
        drop: Any = None,
        how: str = "zero",
        reference: Any = None,
        residual: bool | None = None,
        per_layer: bool = False,
        seed: int = 0,
        steps: int = 20,
        step_size: float = 0.1,
        distance: Distance | None = None,
    ) -> Tensor:
        """The target's output with the components outside a set ablated.

        `y = Σ_c g_c x P_c + Σ_c (1 − g_c) z_c` in every layer, g being 1 on the set; see `fastapd.interventions` for z.

        Args:
            x: The target's input.
            keep: The set that stays: indices, a `Selection`, a mask, or a mapping from layer names to those, as
                `active` of a call; weights between 0 and 1 keep a part. Layers that a mapping does not name keep all.
            drop: Instead of `keep`, the set that is ablated, in the same forms.
            how: "zero", "mean", "resample", "half", "partial" or "adversarial".
            reference: For "mean" and "resample", the input whose samples stand in; None for x itself, where "resample"
                never gives a sample its own contribution. One other sample stands in for all components and layers.
            residual: Whether W minus the sum of the components runs too, unablated; None for only in layers that a
                mapping does not name.
            per_layer: For "half", "partial" and "adversarial": whether the r_c of a component differ between layers.
            seed: Of everything drawn.
            steps: Of the ascent, each along the sign of the gradient. The ascent starts from the worst of r = 0, r = 1
                and the draw of "partial" with the same seed, and the result is the worst of all it saw: never a smaller
                distance than any of those three.
            step_size: Of the ascent.
            distance: What the ascent raises; None for the method's.

        Returns:
            The output, without a graph.

        Raises:
            ValueError: Not exactly one of `keep` and `drop`; unknown names, indices out of range or given twice, masks
                of a wrong shape, weights outside [0, 1]; fewer than two samples to resample from.
            TypeError: Something that is neither indices, a selection nor a mask.

        Cost: one pass for the reference and one for the output; "adversarial" about 3 (steps + 1).
        """
        if (keep is None) == (drop is None):
            got = "neither" if keep is None else "both"
            raise ValueError(refuse("keep or drop", "be given, and not both", got, "keep=[] ablates all components"))
        argument = "keep" if drop is None else "drop"
        kept = self._kept(x, keep if drop is None else drop, argument, residual, drop is not None)
        return self._ablated(x, kept, how, reference, per_layer, seed, steps, step_size, distance)

    def ablation_losses(
        self,
        x: Any,
        keep: Any = None,
        *,
        how: Sequence[str] = HOW,
        reference: Any = None,
        residual: bool | None = None,
        per_layer: bool = False,
        seed: int = 0,
        steps: int = 20,
        step_size: float = 0.1,
        distance: Distance | None = None,
    ) -> dict[str, Any]:
        """How far the output moves when inactive components are ablated, and when active ones are.

        Components that a decomposition calls inactive on a sample should not matter there in whatever way they are
        ablated ("scrubbed" stays small), and those it calls active should ("anti-scrubbed" is far larger).

        Args:
            x: The target's input.
            keep: The active components, as for `ablate`; None for the method's selection on x.
            how: The ways to ablate that the table has.
            reference, residual, per_layer, seed, steps, step_size: As for `ablate`.
            distance: (output, target's output) -> one value an instance, or a scalar; None for the method's.

        Returns:
            "unmasked": the loss with all components on; and for each way a dict with "scrubbed", the inactive ones
            ablated, and "anti-scrubbed", the active ones. For "half" and "partial" anti-scrubbing is that of the APD
            paper's figures: the active ones are off, and the inactive ones have the drawn weights all the same. A
            float, or a list with one for each instance.

        Raises:
            As `ablate`.
        """
        distance = self._distance(distance)
        if keep is None:
            keep = self._selected_mask(x)
        target = self.model.to_instances(_masks.observe(self.model, x)[0])
        options = reference, per_layer, seed, steps, step_size, distance
        found: dict[str, Any] = {}
        scrubbed = self._kept(x, keep, "keep", residual, False)
        anti = self._kept(x, keep, "keep", residual, True)

        def loss(output: Tensor) -> float | list[float]:
            return plain(distance(self.model.to_instances(output), target))

        with torch.no_grad():
            found["unmasked"] = loss(
                _masks.run(self.model, x, {name: layer._replace(active=None) for name, layer in scrubbed.items()})
            )
            for name in how:
                off = name in ("half", "partial")
                found[name] = {
                    "scrubbed": loss(self._ablated(x, scrubbed, name, *options)),
                    "anti-scrubbed": loss(self._ablated(x, anti, name, *options, off=off)),
                }
        return found

    @torch.no_grad()
    def path_effect(self, x: Any, components: Any, layer: str | None = None) -> PathEffect:
        """What components do to the output by the direct path and by way of later layers.

        With x⁰_l what layer l sees in the target, and the components in S ablated in the chosen layers:

            total     f(x) − f(x | every layer computes x_l (W_l − Σ_{c∈S} P_c,l) on what it now sees)
            direct    f(x) − f(x | every layer computes x⁰_l (W_l − Σ_{c∈S} P_c,l) on what it saw before)
            indirect  total − direct

        where the sum is empty in layers that are not chosen, so that they write what they wrote before on the direct
        path. Only paths around later decomposed layers (a residual stream, a skip connection) are direct.

        Args:
            x: The target's input.
            components: Which, as `active` of a call; weights ablate a part.
            layer: The only layer they are ablated in; None for every layer that `components` names.

        Returns:
            `PathEffect(total, direct, indirect)`, each of the shape of the target's output.

        Raises:
            ValueError, TypeError: As a call; or the layer is not a decomposed one.
        """
        names = [site.name for site in self.model.sites]
        if layer is not None:
            if layer not in names:
                raise ValueError(refuse("layer", f"be one of {', '.join(names)}", repr(layer)))
            if isinstance(components, Mapping):
                raise ValueError(refuse("layer", "be None when components is a mapping", repr(layer)))
            components = {layer: components}
        if components is None:
            raise ValueError(refuse("components", "be given", None))
        layers = _masks.parse(self.model, components, None, self._always_on, "components")
        output, seen = _masks.observe(self.model, x)

        def without(call: Call) -> Tensor:
            chosen = layers[call.use.site]
            y = call.rows @ call.matrix(self.model.weight(call.use.site))
            if chosen.active is None:
                return y
            A, B = call.factors(self.model.components)
            weights = _masks.dense(chosen.active, call, A.shape[1], chosen.argument)
            if weights.shape[1] != call.rows.shape[1]:
                return y - call.rows @ _masks.weighted_sum(A, B, weights[:, 0])
            return y - component_forward(call.rows, A, B, weights)

        def along(frozen: bool) -> Tensor:
            return self.model.run(x, lambda call: without(seen[call.key] if frozen else call))

        total, direct = output - along(False), output - along(True)
        return PathEffect(total, direct, total - direct)

    # ---- how

    @property
    def _always_on(self) -> int:
        return int(self.method.distil_from_target)

    def _distance(self, distance: Distance | None) -> Distance:
        from fastapd import losses

        return distance or losses.DISTANCES[self.method.distance]

    @torch.no_grad()
    def _selected_mask(self, x: Any) -> Tensor:
        from fastapd.evaluation import evaluate

        return evaluate(self.model, self.method, x).mask

    def _kept(self, x: Any, given: Any, argument: str, residual: bool | None, invert: bool) -> dict[str, Layer]:
        """Every layer's weights g of what is kept, [I, b, C] or [I, 1, C]; None where all is."""
        layers = _masks.parse(self.model, given, residual, self._always_on, argument)
        _, seen = _masks.observe(self.model, x)
        found = {}
        for name, layer in layers.items():
            if layer.active is None:
                found[name] = layer
                continue
            C = self.model.components.n_components
            weights = _masks.dense(layer.active, seen[name], C, layer.argument).detach()
            if not bool(((weights >= 0) & (weights <= 1)).all()):
                extremes = f"{float(weights.min()):g} to {float(weights.max()):g}"
                raise ValueError(refuse(layer.argument, "have weights in [0, 1]", extremes))
            found[name] = layer._replace(active=1 - weights if invert else weights)
        return found

    @torch.no_grad()
    def _ablated(
        self,
        x: Any,
        kept: Mapping[str, Layer],
        how: str,
        reference: Any,
        per_layer: bool,
        seed: int,
        steps: int,
        step_size: float,
        distance: Distance | None,
        off: bool = False,
    ) -> Tensor:
        """As `ablate`; with `off`, weights g r: what is not kept is off, and the draw weighs what is kept."""
        if how == "zero":
            return _masks.run(self.model, x, kept)
        output, seen = _masks.observe(self.model, x)
        if how in ("mean", "resample"):
            others = seen if reference is None else _masks.observe(self.model, reference)[1]
            if missing := [key for key in seen if key not in others]:
                raise ValueError(refuse("reference", "run the layers as x does", f"one that leaves out {missing}"))
            stand_in = {
                key: others[key]._replace(rows=_stand_in(how, call, others[key], reference is None, seed))
                for key, call in seen.items()
            }
            return self._with_stand_ins(x, kept, stand_in)
        if how not in HOW:
            raise ValueError(refuse("how", f"be one of {', '.join(HOW)}", repr(how)[:80]))
        ablated = [name for name, layer in kept.items() if layer.active is not None]
        places = {name: name if per_layer else "" for name in ablated}
        shapes = {places[name]: (*seen[name].rows.shape[:2], self.model.components.n_components) for name in ablated}
        for name in ablated:
            if tuple(seen[name].rows.shape[:2]) != shapes[places[name]][:2]:
                got = f"{seen[name].rows.shape[1]} samples in {name} and {shapes[places[name]][1]} elsewhere"
                raise ValueError(refuse("x", "give every layer the same samples", got, "pass per_layer=True"))
        like = output if output.is_floating_point() else self.model.sites[0].weight
        draws = {}
        for place, shape in shapes.items():
            # CPU numbers, so that a seed means the same wherever the target is
            r = torch.rand(shape, generator=stream(seed, f"ablation {place}"), device="cpu", dtype=torch.float64)
            draws[place] = ((r < 0.5) if how == "half" else r).to(like.device, like.dtype)

        def at(r: Mapping[str, Tensor]) -> Tensor:
            # g + (1 − g) r, written so that r = 1 gives 1 exactly
            layers = dict(kept)
            for name in ablated:
                g = kept[name].active
                assert isinstance(g, Tensor)
                weights = r[places[name]] * g if off else torch.lerp(r[places[name]], torch.ones_like(g), g)
                layers[name] = kept[name]._replace(active=weights)
            return _masks.run(self.model, x, layers)

        if how != "adversarial" or not draws:
            return at(draws)
        if steps < 0 or not step_size > 0:
            raise ValueError(refuse("steps and step_size", "be at least 0 and above 0", f"{steps} and {step_size}"))
        far, rows = self._distance(distance), self.model.to_instances
        target = rows(output)
        return at(ascend(lambda r: far(rows(at(r)), target), draws, steps, step_size))

    def _with_stand_ins(self, x: Any, kept: Mapping[str, Layer], stand_in: Mapping[str, Call]) -> Tensor:
        """Σ_c g_c x P_c + Σ_c (1 − g_c) z P_c in every layer, z being an input that stands in for x."""

        def write(call: Call) -> Tensor:
            layer, other = kept[call.use.site], stand_in[call.key]
            y = _masks.compute(self.model, call, layer)
            if layer.active is not None:
                assert isinstance(layer.active, Tensor)
                gone = 1 - layer.active.expand(-1, call.rows.shape[1], -1)
                z = other.rows.expand(-1, call.rows.shape[1], -1)
                y = y + component_forward(z, *other.factors(self.model.components), gone)
            return y

        return self.model.run(x, write)


def plain(values: Tensor) -> float | list[float]:
    """One value an instance as Python has it: a float where there is one."""
    found = values.detach().double().reshape(-1).tolist()
    return found[0] if len(found) == 1 else found


def _stand_in(how: str, seen: Call, other: Call, same: bool, seed: int) -> Tensor:
    """The input [I, b or 1, d_in] that stands in for a layer's own."""
    rows = other.rows
    if how == "mean":
        return rows.mean(1, keepdim=True)
    n_instances, wanted, there = rows.shape[0], seen.rows.shape[1], rows.shape[1]
    if there < (2 if same else 1):
        raise ValueError(refuse("x", "have at least two samples to resample from", there, "or pass a reference"))
    generator = stream(seed, f"resample {wanted}")  # the same samples in every layer
    drawn = torch.randint(there - same, (n_instances, wanted), generator=generator, device="cpu")
    if same:  # 1 to there − 1 samples further on: any but its own
        drawn = (drawn + 1 + torch.arange(wanted, device="cpu")) % there
    return rows.gather(1, drawn.to(rows.device)[..., None].expand(-1, -1, rows.shape[-1]))


def ascend(
    loss: Callable[[Mapping[str, Tensor]], Tensor], draw: Mapping[str, Tensor], steps: int, step_size: float
) -> dict[str, Tensor]:
    """Weights in [0, 1] with a large loss: sign-gradient ascent from the worst of 0, 1 and the draw.

    Args:
        loss: Of the weights; one value an instance, each of its own instance's weights, or one for all.
        draw: Weights [I, b, C] by name.
        steps: Of the ascent.
        step_size: Of the ascent.

    Returns:
        For each instance the weights with the largest loss of all that were seen.
    """
    names = list(draw)
    best: dict[str, Tensor] = {}
    best_loss: Tensor | None = None

    def see(weights: Mapping[str, Tensor], value: Tensor) -> None:
        nonlocal best, best_loss
        value = value.detach().reshape(-1)
        if best_loss is None:
            best, best_loss = {name: weights[name].detach().clone() for name in names}, value.clone()
            return
        larger = value > best_loss
        best = {name: torch.where(larger[:, None, None], weights[name].detach(), best[name]) for name in names}
        best_loss = torch.where(larger, value, best_loss)

    for start in (
        draw,
        {n: torch.zeros_like(t) for n, t in draw.items()},
        {n: torch.ones_like(t) for n, t in draw.items()},
    ):
        with torch.no_grad():
            see(start, loss(start))
    weights = best
    for step in range(steps + 1):
        with torch.enable_grad():
            weights = {name: t.detach().clone().requires_grad_() for name, t in weights.items()}
            value = loss(weights)
            slopes = torch.autograd.grad(value.sum(), [weights[name] for name in names], allow_unused=True)
        see(weights, value)
        if step < steps:
            moves = {
                name: 0 if slope is None else step_size * slope.sign()
                for name, slope in zip(names, slopes, strict=True)
            }
            weights = {name: (weights[name].detach() + moves[name]).clamp(0, 1) for name in names}
    return best
