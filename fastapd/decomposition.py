"""The result: a target with its components, however they were made; run it, look at it, edit it, save it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastapd import _masks
from fastapd.edits import Edits
from fastapd.interventions import Interventions
from fastapd.model import ComponentModel, find_sites
from fastapd.scores import Scores, faithfulness_error
from fastapd.spectra import Spectra

if TYPE_CHECKING:
    from jaxtyping import Float

    from fastapd._rundir import RunDirectory
    from fastapd.config import APD

_SMALL = 10**9  # multiplications that a repr may cost


class Decomposition(Scores, Interventions, Spectra, Edits):
    """A target, its components and the method that selects among them.

    `fastapd.decompose` makes one by training; `from_factors`, `from_matrices` and `from_svd` without; `load` from a
    file. What one can do with it does not depend on that.

    Args:
        model: The target with its components.
        method: How components are attributed and selected; None for `APD(topk=1.0)`.
        made: How the components came about, for a person to read.

    Attributes:
        history: The rows of metrics of the run that made it, oldest first; empty if none did.
        last_batch: The last batch of that run, if it is still at hand; None otherwise.
    """

    def __init__(self, model: ComponentModel, method: APD | None = None, made: str = "") -> None:
        self.model = model
        self.method = method or _default_method()
        self.history: list[dict[str, Any]] = []
        self.last_batch = None
        self._made = made
        self._loaded_from = ""

    # ---- making one without training

    @classmethod
    def from_factors(
        cls,
        model: nn.Module,
        factors: Mapping[str, tuple[Any, Any]],
        method: APD | None = None,
        ties: Mapping[str, str] | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ) -> Decomposition:
        """The components `P_c = A_c B_c` that are given, nothing trained.

        Args:
            model: The target; it is not modified.
            factors: For each untied layer (A, B) with A [C, d_in, m] and B [C, m, d_out], or both with n_instances in
                front, so that the layer computes y = x W with W about Σ_c A_c B_c. `nn.Linear(d_in, d_out)` stores the
                transpose of W: a component of its `weight` [d_out, d_in] is (A_c B_c)ᵀ. The rank m may differ between
                layers. Copied, in the dtype and on the device of the layer's matrix.
            method: How components are attributed and selected; None for `APD(topk=1.0)`.
            ties: The layers to decompose that share the matrix of another, and the name of that one.
            output: Takes the tensor to compare from what the model returns, as for `decompose`.

        Returns:
            The decomposition; it need not be faithful.

        Raises:
            ValueError: The model has no such layer, a shape does not fit, a factor is not finite, or C differs.
            TypeError: A factor is not floating point.
        """
        from fastapd import _making

        return cls(_making.fit(model, factors, ties, output), method, "given factors")

    @classmethod
    def from_matrices(
        cls,
        model: nn.Module,
        matrices: Mapping[str, Any],
        rank: int | None = None,
        method: APD | None = None,
        ties: Mapping[str, str] | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ) -> Decomposition:
        """The components that are given as matrices, factorised by SVD: `P_c = U S Vᵀ = (U √S)(√S Vᵀ)`.

        Args:
            model: The target; it is not modified.
            matrices: For each untied layer P [C, d_in, d_out], or with n_instances in front: y = x W, the transpose
                of what `nn.Linear` stores.
            rank: What each component is cut to, its nearest matrix of that rank; None for the largest rank there is.
            method, ties, output: As for `from_factors`.

        Returns:
            The decomposition.

        Raises:
            As `from_factors`; ValueError also for a rank below 1.
        """
        from fastapd import _making

        if not isinstance(matrices, Mapping):
            raise TypeError(_masks.refuse("matrices", "map layers to matrices", type(matrices).__name__))
        factors = {name: _making.split(name, P, rank) for name, P in matrices.items()}
        return cls(_making.fit(model, factors, ties, output), method, "given matrices")

    @classmethod
    def from_svd(
        cls,
        model: nn.Module,
        targets: Sequence[str],
        C: int,
        method: APD | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ) -> Decomposition:
        """The baseline that knows no features: component c is the c-th term `σ_c u_c v_cᵀ` of each layer's SVD.

        Args:
            model: The target; it is not modified.
            targets: fnmatch patterns over its module names, as for `decompose`.
            C: Number of components. With fewer than a layer has singular values its smallest terms are missing.
            method: How components are attributed and selected; None for `APD(topk=1.0)`.
            output: Takes the tensor to compare from what the model returns, as for `decompose`.

        Raises:
            ValueError: A pattern matches nothing, or C is below 1.
            TypeError: A matched module cannot be decomposed.
        """
        from fastapd import _making, metrics
        from fastapd.components import Components

        sites = find_sites(model, targets)
        given = {site.name: metrics.svd_factors(site.weight, C, 1) for site in sites if not site.tied_to}
        ties = _making.ties_of(sites)
        made = ComponentModel(model, sites, Components.from_factors(given, ties), output)
        return cls(made, method, "SVD of each layer")

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        strict: bool = True,
        output: Callable[[Any], Tensor] | None = None,
    ) -> Decomposition:
        """What `save` wrote, or the run directory of a training.

        Args:
            path: The file, or a directory that `decompose(out=...)` made.
            model: The target; it is not modified.
            strict: Whether its decomposed matrices must be, to the bit, those that the components were made for.
            output: Takes the tensor to compare from what the model returns, as for `decompose`.

        Returns:
            The decomposition, with the method of the file; from a run directory also with its history.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, of another kind or version; the model lacks a layer or has it in another
                size; with `strict`, it has other weights.
        """
        from fastapd import _decomposition_file, _making

        held = _decomposition_file.read(path)
        _decomposition_file.check_shapes(held, model)
        fitted = _making.fit(model, held.factors, held.ties, output)
        if strict:
            _decomposition_file.check_weights(held, fitted)
        found = cls(fitted, held.method, held.made)
        found.history, found._loaded_from = held.history, Path(path).name
        return found

    def save(self, path: str | Path | RunDirectory) -> None:
        """Writes components, ties, method and a hash of every decomposed matrix, for `load`; the target stays with you.

        Args:
            path: A file name that ends in .safetensors, replaced if it is there. In a run directory that is still
                written to, `components.safetensors` and the target's weights as `target.safetensors`.

        Raises:
            ValueError: The name has another ending.
            FileNotFoundError: The directory does not exist.
        """
        from fastapd import _decomposition_file
        from fastapd._rundir import RunDirectory

        if not isinstance(path, RunDirectory):
            _decomposition_file.write(path, self.model, self.method, self.made)
            return
        texts = _decomposition_file.texts(self.model, self.method, self.made)
        path.save_tensors(_decomposition_file.IN_RUN, self.model.components.export(), texts)
        state = {name: t.detach() for name, t in self.model.target.state_dict().items() if isinstance(t, Tensor)}
        path.save_tensors("target.safetensors", state, {"format": "fastapd-target-1"})

    # ---- running it

    @torch.no_grad()
    def __call__(self, x: Any, active: Any = None, residual: bool | None = None) -> Tensor:
        """The target's output when it runs on chosen components, without a graph; `forward` has one.

        Every decomposed layer computes `Σ_c s_c x P_c`, and with the residual `x W + Σ_c (s_c − 1) x P_c`. All
        components with the residual are the target itself, however unfaithful they are.

        Args:
            x: The target's input.
            active: Which components run. None for all. Indices, for every sample. A `Selection`. A mask, bool or of
                float weights: [C], or [n_instances, batch, C], or for targets without instances [.., C] with the axes
                of samples that the layers' inputs have ([batch, position, C] for sequences); an axis of samples may be
                1. Or a mapping from layer names to any of these; layers that it does not name are as with None.
            residual: Whether W minus the sum of the components runs too. None: only in layers whose active is None,
                which are then the target's own.

        Returns:
            The target's output.

        Raises:
            ValueError: Indices out of range or given twice, a mask of a wrong shape or with NaN, an unknown layer.
            TypeError: Something that is neither indices, a selection nor a mask.
        """
        return self.forward(x, active, residual)

    def forward(self, x: Any, active: Any = None, residual: bool | None = None) -> Tensor:
        """As a call, but differentiable: in x, in float masks and in the components.

        The residual counts as W − Σ_c P_c, a function of the components; W itself receives no gradient.

        Args:
            x, active, residual: As for a call.

        Returns:
            The target's output.

        Raises:
            As a call.
        """
        return _masks.run(self.model, x, _masks.parse(self.model, active, residual, self._always_on, "active"))

    def plan(self, x: Any) -> str:
        """How a step on a batch like x takes its attributions, and what that costs: what `fastapd plan` prints.

        After `decompose(.., steps=0)` it tells before a run what the run will hold in memory.

        Args:
            x: The target's input; only its shape matters.
        """
        from fastapd import _plan

        return "\n".join(_plan.describe(self.model, x, self.method))

    def parts(self, layer: str) -> Float[Tensor, "I C d_in d_out"]:
        """Each component's own matrix in a layer, detached."""
        self._known(layer)
        return self.model.components.parts(layer).detach()

    # ---- what it is

    @property
    def made(self) -> str:
        """How the components came about."""
        if self.history:
            return f"training, {self.history[-1].get('step', '?')} steps"
        return self._made or "given components"

    @property
    def _attributed(self) -> str:
        """How components are attributed, and whether that was an estimate."""
        method = self.method
        if not self.model.estimated:
            return f"{method.attribution} attributions"
        refined = "" if method.attribution_refined is None else f", {method.attribution_refined} of a sample refined"
        return f"gradient attributions estimated by {method.attribution_probes} random directions{refined}"

    def __repr__(self) -> str:
        components, method = self.model.components, self.method
        sizes = f"C = {components.n_components}, rank {components.rank}"
        if components.n_instances > 1:
            sizes += f", {components.n_instances} instances"
        shapes = [
            f"{name} [{layer.d_in}, {layer.d_out}]" + (f" tied to {layer.tied_to}" if layer.tied_to else "")
            for name, layer in components.layers.items()
        ]
        more = f" and {len(shapes) - 4} more" if len(shapes) > 5 else ""
        chosen = "all, weighted (Lp)" if method.topk is None else f"top-k {method.topk:g} by {method.selection}"
        lines = [
            f"Decomposition of {type(self.model.target).__name__}: {sizes}",
            f"  layers        {', '.join(shapes[: 4 if more else None])}{more}",
            f"  method        {chosen}, {self._attributed}, p {method.p:g}",
            f"  made by       {self.made}" + (f", loaded from {self._loaded_from}" if self._loaded_from else ""),
        ]
        cost = components.n_components * components.rank * self.model.n_params * components.n_instances
        if cost <= _SMALL:
            errors = faithfulness_error(self.model)
            low, high = float(errors.min()), float(errors.max())
            between = f"{low:.2g}" if components.n_instances == 1 else f"{low:.2g} to {high:.2g}"
            lines.append(f"  faithfulness  {between}, relative error of the components' sum")
        return "\n".join(lines)


def _default_method() -> APD:
    from fastapd.config import APD

    return APD(topk=1.0)
