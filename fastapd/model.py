"""Runs any target with its decomposed layers replaced by masked component sums, and records what passes through them.

A *site* is what the target multiplies by a matrix: a module or a parameter, found by name (`_sites`). Everything else
of the target runs as it is, so this is the seam for any `nn.Module`. The target is never modified: a site is shadowed
for the length of one call (`_intercept`), and modules in training mode are in evaluation mode meanwhile. Not for
several threads.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastapd._chain import Chain, NotAChainError, trace
from fastapd._intercept import evaluating, replaced
from fastapd._random import stream
from fastapd._record import Call, Inputs, Pass, Record, ScaledGradient, Use, applied, factors, leading, of_use
from fastapd._sites import Linear, Site, TransposedLinear, adapter_of, find_sites
from fastapd.components import Components
from fastapd.ops import Selection, component_forward, component_forward_selected, component_sum
from fastapd.ops._component_forward import forward_selected_into_gradients
from fastapd.planning import Form, Plan, Sizes, Values, choose, gated_linear_form

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "Call",
    "ComponentModel",
    "Linear",
    "Record",
    "Site",
    "TransposedLinear",
    "Use",
    "factors",
    "find_sites",
    "leading",
    "version",
]


def version(t: Tensor) -> int:
    """How often a tensor was written to, as far as torch counts it."""
    return 0 if t.is_inference() else t._version


class ComponentModel:
    """A target together with components for some of its layers.

    Args:
        target: Any module; it runs in evaluation mode.
        sites: From `find_sites(target, ...)`.
        components: Their components; in float32 also where the target's dtype is narrower.
        output: Takes the tensor to compare from what the target returns; None for a target that returns a tensor, or
            something with `logits`.

    Raises:
        ValueError: If the components do not fit the sites.
    """

    def __init__(
        self,
        target: nn.Module,
        sites: Sequence[Site],
        components: Components,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        for site in sites:
            if components.layers.get(site.name) != site.shape or components.n_instances != site.weight.shape[0]:
                raise ValueError(
                    f"ComponentModel: components must have a layer {site.name} {tuple(site.weight.shape)} "
                    f"[n_instances, d_in, d_out], got {components.extra_repr()}"
                )
        self.target, self.sites, self.components = target, list(sites), components
        self._some = next(iter(components.B.values()))
        self.take_output = output
        self._modules = list(target.modules())
        self._heads: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._threshold: Tensor | None = None
        self.probes: torch.Generator | None = None
        self.estimated = False  # whether the last attributions were
        self.batched_gradients: bool | None = None  # whether the target's can be, once that was tried
        self._by_name = {site.name: site for site in self.sites}
        self._chain_checked = False
        self._plans: dict[Any, Plan] = {}
        self._form: Form | None = None
        self._form_key: list[tuple[int, int]] = []
        self._form_of: list[Tensor] = []

    @property
    def weights(self) -> dict[str, Tensor]:
        """The target's matrices, detached, [n_instances, d_in, d_out], in the components' dtype."""
        if (mixed := self.mixed) is not None:
            return {site.name: site.weight.to(mixed[0]) for site in self.sites}
        return {site.name: site.weight for site in self.sites}

    @property
    def mixed(self) -> tuple[torch.dtype, torch.dtype] | None:
        """The components' dtype and the target's, if they differ."""
        of_components = self._some.dtype
        of_target = self.sites[0].dtype
        return None if of_components == of_target else (of_components, of_target)

    def _here(self, x: Inputs) -> Inputs:
        """On the device of the components, which may be another than the caller's model is on."""
        device = self._some.device
        if isinstance(x, Tensor):
            return x if x.device == device else x.to(device)
        return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in x.items()}

    def probe_generator(self) -> torch.Generator:
        """The source of random directions; of a seed of its own unless one was set."""
        if self.probes is None:
            self.probes = stream(0, "probes")
        return self.probes

    @property
    def n_params(self) -> int:
        """Decomposed parameters of one instance; a tied matrix counts as often as it is used."""
        return sum(math.prod(site.weight.shape[1:]) for site in self.sites)

    def to_instances(self, output: Tensor) -> Float[Tensor, "I b o"]:
        """The target's output with one axis of samples for each instance, whatever axes it has."""
        output = output if output.dim() > 1 or self.sites[0].adapter.instances else output.unsqueeze(-1)
        return output.reshape(self.components.n_instances, -1, output.shape[-1])

    def threshold(self, attributions: Float[Tensor, "I b C"]) -> Float[Tensor, " I"]:
        """Where the last selection from attributions like these ended, a hint for the next; NaN at first."""
        like = attributions.shape[:1], attributions.dtype, attributions.device
        known = self._threshold
        if known is None or (known.shape, known.dtype, known.device) != like:
            known = self._threshold = attributions.new_full(attributions.shape[:1], math.nan)
        return known

    def kept(self) -> tuple[Any, ...]:
        """What one step leaves for the next to read, beside parameters: the chain's form and the threshold."""
        return self._form, self._threshold

    def forward(
        self,
        x: Inputs,
        active: Selection | Tensor | None = None,
        always_on: int = 0,
        accumulate: bool = False,
        known: Values | None = None,
    ) -> Record:
        """Runs the target on component sums.

        Args:
            x: The target's input.
            active: Which components run: a `Selection`, a mask [n_instances, batch or 1, C] of any weights, or None for
                all. The batch is that of the sites' inputs: every position of a sequence is a sample.
            always_on: With a selection, how many components at the end run on every sample; the selection is then one
                of the others alone.
            accumulate: With a selection, whether the backward pass adds the factors' gradients to those of the
                components itself, instead of handing them to autograd.
            known: From a record of the target on the same x: what comes before all sites is not computed again.

        Returns:
            The output and what passed through the sites, differentiable in the components.
        """

        def compute(key: str, use: Use | None, rows: Tensor) -> Tensor:
            name = key if use is None else use.site
            if isinstance(active, Selection) and accumulate and not always_on and (use is None or use.ids is None):
                stored, gradients = self.components.stored(name), self.components.gradients(name)
                if use is not None and use.transposed:
                    stored, gradients = (stored[1], stored[0]), (gradients[1], gradients[0])
                return forward_selected_into_gradients(rows, *stored, active, *gradients)
            if active is None:
                W = self.components.weight(name)
                return rows @ W if use is None else applied(use, rows, W)
            A, B = self.components.factors(name) if use is None else of_use(self.components, use)
            if isinstance(active, Selection):
                ranked = A.shape[1] - always_on
                y = component_forward_selected(rows, A[:, :ranked], B[:, :ranked], active)
                return y + rows @ component_sum(A[:, ranked:], B[:, ranked:]) if always_on else y
            mask = active.to(rows.dtype) if mixed is not None and active.is_floating_point() else active
            return component_forward(rows, A, B, mask.expand(-1, rows.shape[1], -1))

        x, mixed = self._here(x), self.mixed
        through = Pass(self.components, mixed, compute)
        if mixed is not None and mixed[1] == torch.float16:
            through.scale.append(
                self._some.new_ones(())
            )  # else small gradients would vanish on their way through the target
        output = self._run(x, through, known)[0]
        if mixed is not None:
            output = output.to(mixed[0])
            if through.scale:
                output = ScaledGradient.apply(output, through.scale, "begin")
        return Record(output, through.inputs, through.outputs, uses=through.uses)

    def run(self, x: Inputs, write: Callable[[Call], Tensor]) -> Tensor:
        """The target's output when each product with a decomposed matrix is what `write` makes of it, differentiable.

        Args:
            x: The target's input.
            write: What a layer writes [n_instances, batch, d_out], before its bias.
        """

        def compute(key: str, use: Use | None, rows: Tensor) -> Tensor:
            return write(Call(key, Use(key) if use is None else use, rows, through.shape))

        through = Pass(self.components, self.mixed, compute)
        through.same_samples = False
        output = self._run(x, through)[0]
        return output if self.mixed is None else output.to(self.mixed[0])

    def weight(self, name: str) -> Float[Tensor, "I d_in d_out"]:
        """The target's matrix in a layer, detached, in the components' dtype."""
        weight = self._by_name[name].weight
        return weight if self.mixed is None else weight.to(self.mixed[0])

    def record_target(self, x: Inputs, differentiable: bool = False, of_components: bool = False) -> Record:
        """Runs the target itself and records its sites.

        Args:
            x: The target's input.
            differentiable: Whether the output can be differentiated by the recorded site outputs. Parameters of the
                target never receive gradients.
            of_components: Record the component model with all components on instead; its weights count as constants.
        """
        weights: dict[str, Tensor] = {}
        x, mixed = self._here(x), self.mixed

        def compute(key: str, use: Use | None, rows: Tensor) -> Tensor:
            name = key if use is None else use.site
            W = self.components.weight(name).detach() if of_components else self._by_name[name].weight
            W = weights[name] = W if mixed is None else W.to(mixed[0])
            y = rows @ W if use is None else applied(use, rows, W)
            if differentiable and not y.requires_grad:
                y.requires_grad_()
            return y

        through, seen = Pass(self.components, mixed, compute), []
        with torch.set_grad_enabled(differentiable), self._watched(seen) if differentiable else _nothing():
            output, values = self._run(x, through)
            measured = [self._narrowed(module, h) for module, h, y in seen if values is None and y is output]
            output = output if mixed is None else output.to(mixed[0])
        inputs = {key: rows.detach() for key, rows in through.inputs.items()}
        if values is not None:
            return Record(output, inputs, through.outputs, Values(values, weights), through.uses)
        axes = self._axes(x, output)
        return Record(output, inputs, through.outputs, None, through.uses, axes, measured[0] if measured else None)

    def _axes(self, x: Inputs, output: Tensor) -> int:
        """How many leading axes of the output of a target that is no chain count samples."""
        first = leading(x)
        if self.sites[0].adapter.instances:
            return 2
        if first.dim() == 0 or (first.dim() == 1 and first.is_floating_point()):
            return 0  # one sample
        if output.dim() == 0 or output.shape[0] != first.shape[0]:
            raise ValueError(
                f"decompose: model must return the batch of {first.shape[0]} on its first axis, "
                f"got shape {list(output.shape)}"
            )
        return 1

    @contextlib.contextmanager
    def _watched(self, seen: list[tuple[nn.Module, Tensor, Tensor]]) -> Iterator[None]:
        """Notes inputs and outputs of the layers that are wider than what they get, as the last one of a language model
        is: a gradient has the same length before as after a matrix with orthonormal rows."""
        own = {id(site.module) for site in self.sites}
        watched = []
        for module in self._modules:
            if type(module) is nn.Linear and id(module) not in own and module.out_features > module.in_features:
                if "forward" not in vars(module):
                    watched.append(module)
        try:
            for module in watched:

                def forward(input: Tensor, module: nn.Linear = module) -> Tensor:
                    y = nn.Linear.forward(module, input)
                    seen[:] = [(module, input, y)]
                    return y

                vars(module)["forward"] = forward
            yield
        finally:
            for module in watched:
                vars(module).pop("forward", None)

    def _narrowed(self, module: nn.Module, h: Tensor) -> Tensor:
        """h R^T for the transpose Q R of the layer's matrix."""
        weight: Tensor = module.weight.detach()  # type: ignore[assignment]
        known = self._heads.get(id(module))
        if known is None or known[0].data_ptr() != weight.data_ptr() or known[1] != version(weight):
            wide = weight if weight.dtype == torch.float64 else weight.float()
            known = self._heads[id(module)] = weight, version(weight), torch.linalg.qr(wide, mode="r").R
        return h.to(known[2].dtype) @ known[2].mT

    def _run(self, x: Inputs, through: Pass, known: Values | None = None) -> tuple[Tensor, list[Tensor] | None]:
        """The target's output with its sites replaced, and the values of its chain if it is one."""

        def target() -> Tensor:
            through.begin()
            with replaced(self.sites, through), evaluating(self._modules):
                found = self.target(x) if isinstance(x, Tensor) else self.target(**x)
            self._check_samples(through)
            return self._output(found)

        if isinstance(self.chain, str) or not isinstance(x, Tensor):
            return target(), None
        expected = None if self._chain_checked else target()
        if expected is not None:
            through.begin()
        given = None if known is None else known.values
        values = self.chain.run(x, lambda name, rows: through(self._by_name[name], rows), given)
        output = values[-1]
        if expected is not None and (reason := self.chain.irregularity(values, self.components.n_instances)):
            self.chain = reason
            return target(), None
        if expected is not None and expected.numel():
            if output.shape != expected.shape or not torch.allclose(output, expected, 1e-5, 1e-6, equal_nan=True):
                self.chain = "run by itself it gives another output than what was traced of it"
                return target(), None
            self._chain_checked = True
        return output, values

    def _output(self, found: Any) -> Tensor:
        if self.take_output is not None:
            taken = self.take_output(found)
            if not isinstance(taken, Tensor):
                raise TypeError(f"decompose: output must return a tensor, got {type(taken).__name__}")
            found = taken
        if isinstance(found, Tensor):
            if not found.is_floating_point():
                raise TypeError(f"decompose: model must return floating-point numbers, got {found.dtype}")
            return found
        logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"decompose: model must return a tensor or something with logits, got {type(found).__name__}; pass "
                "output=, a function that takes the tensor from it"
            )
        return logits

    def _check_samples(self, through: Pass) -> None:
        """Every site must have run, and all on the same samples."""
        ran = {through.uses[key].site if key in through.uses else key for key in through.inputs}
        if missing := [site.name for site in self.sites if site.name not in ran]:
            raise ValueError(
                f"decompose: targets must run when the model does, got {', '.join(missing)}, which did not; leave it "
                "out, or name what uses its matrix"
            )
        counts = {key: rows.shape[1] for key, rows in through.inputs.items()}
        if through.same_samples and len(set(counts.values())) > 1:
            shown = ", ".join(f"{key}: {n}" for key, n in counts.items())
            raise ValueError(
                f"decompose: targets must all see the same number of samples, got {shown}; decompose those that "
                "differ one after the other"
            )

    @functools.cached_property
    def chain(self) -> Chain | str:
        """The target as a chain of linear maps and nonlinearities, or why it is none.

        Its first output is compared with the target's own. The target must not change its structure afterwards; its
        parameters may.
        """
        if len({site.adapter.instances for site in self.sites}) > 1:
            return "only some of its layers have an axis of instances"
        if self.mixed is not None:
            return "its components have another dtype than it has"
        for site in self.sites:
            if site.is_parameter or site.adapter.ids:
                return f"{site.name} is {'a parameter by itself' if site.is_parameter else 'an embedding'}"
        if self.take_output is not None:
            return "its output is taken from what it returns"
        try:
            with evaluating(self._modules):
                return trace(self.target, {site.name: site.module for site in self.sites}, _linear)
        except NotAChainError as error:
            return str(error)

    def plan(self, x: Inputs) -> Plan:
        """How gradient attributions of a batch like x are computed; decided once for every shape."""
        if not isinstance(x, Tensor):
            return Plan("reverse", "the target takes its inputs by name", (), {})
        key = (tuple(x.shape), x.dtype, x.device)
        if key not in self._plans:
            found = None if isinstance(self.chain, str) else self.record_target(x).found
            if found is None:
                reason = self.chain if isinstance(self.chain, str) else "its batch is empty"
                return Plan("reverse", f"the target is not a chain of linear maps and nonlinearities: {reason}", (), {})
            n_rows = self.sites[0].to_instances(x).shape[1]
            c = self.components
            sizes = Sizes(c.n_instances, n_rows, c.n_components, c.rank, x.element_size())
            assert not isinstance(self.chain, str)
            self._plans[key] = choose(self.form(found), self.chain, found, sizes)
        return self._plans[key]

    def form(self, found: Values) -> Form:
        """The chain's gated linear form; kept until a constant of the target changes."""
        assert not isinstance(self.chain, str)
        constants = [get() for get in self.chain.constants]  # what is computed from them is another tensor every time
        constants += found.weights.values()
        key = [(t.data_ptr(), version(t)) for t in constants]
        if key != self._form_key:
            self._form, self._form_key = gated_linear_form(self.chain, found), key
            self._form_of = constants  # kept, so that no other tensor comes to lie where one of them was
        assert self._form is not None
        return self._form


def _linear(module: nn.Module) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor | None]] | None:
    adapter = adapter_of(module)
    return None if adapter is None or adapter.ids else (adapter.weight, adapter.bias)


def _nothing() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
