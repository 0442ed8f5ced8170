"""A target as the chain of linear maps, sums and elementwise nonlinearities that it is, if it is one.

`trace` reads a module symbolically into a list of steps. What it finds is enough to run the target, with any of its
sites replaced, and to send tangents through it; `planning` does the latter. A target that does more (attention,
normalisation, branches on data) is not a chain, and `trace` says what it met.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

ELEMENTWISE: frozenset[Callable[..., Any]] = frozenset(
    (
        *(torch.relu, torch.tanh, torch.sigmoid, torch.sin, torch.cos, torch.exp, torch.square, torch.abs),
        *(F.relu, F.gelu, F.silu, F.leaky_relu, F.elu, F.selu, F.celu, F.softplus, F.mish, F.hardtanh, F.relu6),
        *(F.logsigmoid, F.softsign, F.tanhshrink, F.hardsigmoid, F.hardswish, F.tanh, F.sigmoid),
    )
)
ELEMENTWISE_METHODS = frozenset(("relu", "tanh", "sigmoid", "sin", "cos", "exp", "square", "abs"))
ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Mish, nn.Hardtanh, nn.ReLU6),
    *(nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.Hardsigmoid, nn.Hardswish, nn.Tanh, nn.Sigmoid),
)
_ADD = (operator.add, operator.iadd, torch.add)
_MATMUL = (operator.matmul, torch.matmul)


class Step(NamedTuple):
    """How one value of a chain follows from earlier ones.

    Attributes:
        kind: "input"; "site", a decomposed layer; "linear", times a constant matrix, plus a constant; "shift", plus a
            constant; "add", of two values; "elementwise".
        sources: The numbers of the values it follows from.
        name: For a person: the site, the module or the function.
        function: Its value from theirs; None for inputs and sites.
        matrix: Of a linear step, [d_in, d_out] with or without a leading n_instances.
        constant: What a site, a linear step or a shift adds, or None.
        is_relu: Whether the nonlinearity is max(x, 0), whose derivative shows in its value.
    """

    kind: str
    sources: tuple[int, ...]
    name: str
    function: Callable[..., Tensor] | None = None
    matrix: Callable[[], Tensor] | None = None
    constant: Callable[[], Tensor] | None = None
    is_relu: bool = False


Linear = tuple[Callable[[Any], Tensor], Callable[[Any], Tensor | None]]


class NotAChainError(Exception):
    """What a target does that a chain does not."""


class Chain(NamedTuple):
    """The steps of a target; the value of the last one is its output."""

    steps: list[Step]

    before_sites: frozenset[int]
    """The numbers of the values that no site has a part in."""

    constants: list[Callable[[], Tensor]]
    """The target's tensors that its matrices and constants are or are made of, looked up when called."""

    def run(self, x: Tensor, layer: Callable[[str, Tensor], Tensor], known: list[Tensor] | None = None) -> list[Tensor]:
        """The values of all steps.

        Args:
            x: The target's input.
            layer: The output, bias included, of the site of that name for its input.
            known: The values of an earlier run on the same input, of which those before all sites are taken over.
        """
        values: list[Tensor] = []
        for number, step in enumerate(self.steps):
            sources = [values[k] for k in step.sources]
            if step.kind == "input":
                values.append(x)
            elif known is not None and number in self.before_sites:
                values.append(known[number])
            elif step.kind == "site":
                values.append(layer(step.name, *sources))
            else:
                assert step.function is not None
                values.append(step.function(*sources))
        return values

    def irregularity(self, values: list[Tensor], n_instances: int) -> str:
        """Where a step is not the same map for every sample of an instance, or none of rows to rows; "" if nowhere.

        Args:
            values: Of all steps, on any batch.
            n_instances: The leading axis that constants may have.
        """
        for step, value in zip(self.steps, values, strict=True):
            shapes = {values[k].shape for k in step.sources} if step.kind in ("add", "shift", "elementwise") else set()
            if shapes - {value.shape}:
                return f"{step.name} broadcasts a value"
            if step.matrix is not None:
                shape = step.matrix().shape
                if not 2 <= len(shape) <= 3 or shape[:-2] not in ((), (1,), (n_instances,)):
                    return f"{step.name} takes a constant of shape {list(shape)}"
            if step.constant is not None:
                shape = step.constant().shape
                instances, rows = (1, 1, *shape[:-1])[-2:]
                if len(shape) > 3 or instances not in (1, n_instances) or rows != 1:
                    return f"{step.name} takes a constant of shape {list(shape)}"
        return ""


class _Tracer(fx.Tracer):
    """Stops at the modules that steps are made of."""

    def __init__(self, leaves: Sequence[nn.Module]) -> None:
        super().__init__()
        self._leaves = {id(module) for module in leaves}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._leaves or super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        # it would become an attribute of the target, and be the same for every batch
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            if not any(a is buffer for buffer in self.root.buffers()):
                raise NotAChainError("it makes a tensor of its own")
        return super().create_arg(a)


def trace(
    target: nn.Module,
    sites: dict[str, nn.Module],
    linear: Callable[[nn.Module], Linear | None],
) -> Chain:
    """Reads a target as a chain.

    Args:
        target: Any module.
        sites: Its decomposed modules by name.
        linear: For a module that is a linear map, how to find its matrix [.., d_in, d_out] and its bias.

    Raises:
        NotAChainError: If it is none, with the first thing that does not fit.
    """
    leaves = [m for m in target.modules() if linear(m) is not None] + list(sites.values())
    if any(leaf is target for leaf in leaves):
        raise NotAChainError("the target itself is a single layer")
    try:
        graph = _Tracer(leaves).trace(target)
    except NotAChainError:
        raise
    except Exception as error:  # tracing runs the target's own code on proxies: anything may come out of it
        text = str(error).strip().splitlines()
        raise NotAChainError(f"it cannot be traced: {type(error).__name__}: {text[0] if text else ''}") from error
    reader = _Reader(target, sites, linear)
    steps = reader.read(graph)
    before: set[int] = set()
    for number, step in enumerate(steps):
        if step.kind != "site" and before.issuperset(step.sources):
            before.add(number)
    return Chain(steps, frozenset(before), reader.leaves)


class _Reader:
    """Turns the nodes of a graph into steps. What does not depend on the input is a constant, looked up when used."""

    def __init__(self, target: nn.Module, sites: dict[str, nn.Module], linear: Callable) -> None:
        self.target, self.linear = target, linear
        self.names = {id(module): name for name, module in sites.items()}
        self.steps: list[Step] = []
        self.numbers: dict[fx.Node, int] = {}
        self.constants: dict[fx.Node, Callable[[], Any]] = {}
        self.leaves: list[Callable[[], Tensor]] = []

    def read(self, graph: fx.Graph) -> list[Step]:
        for node in graph.nodes:
            if node.op == "output":
                return self._up_to(node.args[0])
            self._read(node)
        raise NotAChainError("it returns nothing")

    def _up_to(self, node: Any) -> list[Step]:
        """The steps that the output needs, renumbered."""
        if not isinstance(node, fx.Node) or node not in self.numbers:
            raise NotAChainError("its output is not one tensor that depends on its input")
        last, needed = self.numbers[node], set()
        stack = [last]
        while stack:
            number = stack.pop()
            if number not in needed:
                needed.add(number)
                stack.extend(self.steps[number].sources)
        place = {number: k for k, number in enumerate(sorted(needed))}
        return [self.steps[n]._replace(sources=tuple(place[k] for k in self.steps[n].sources)) for n in sorted(needed)]

    def _add(self, node: fx.Node, step: Step) -> None:
        self.numbers[node] = len(self.steps)
        self.steps.append(step)

    def _read(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self.steps:
                raise NotAChainError("it takes more than one input")
            self._add(node, Step("input", (), "input"))
        elif node.op == "get_attr":
            self.constants[node] = lambda name=str(node.target): operator.attrgetter(name)(self.target)
            self.leaves.append(self.constants[node])
        elif not any(n in self.numbers for n in node.all_input_nodes):
            self._constant(node)
        elif node.op == "call_module":
            self._module(node, self.target.get_submodule(str(node.target)))
        else:
            self._function(node)

    def _constant(self, node: fx.Node) -> None:
        """Of constants alone: views of parameters, say."""
        if node.op == "call_module":
            raise NotAChainError(f"{node.target} runs on a constant")

        def compute() -> Any:
            args = fx.map_arg((node.args, node.kwargs), lambda n: self.constants[n]())
            assert isinstance(args, tuple)
            if node.op == "call_method":
                receiver, *rest = args[0]
                return getattr(receiver, str(node.target))(*rest, **args[1])
            assert callable(node.target)
            return node.target(*args[0], **args[1])

        self.constants[node] = compute

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        (source,) = (self.numbers.get(n, -1) for n in node.all_input_nodes) if len(node.all_input_nodes) == 1 else (-1,)
        name = str(node.target)
        if source < 0 or node.kwargs or len(node.args) != 1:
            raise NotAChainError(f"{name} takes more than one value")
        if (found := self.linear(module)) is not None:
            matrix, bias = found
            constant = (lambda: bias(module)) if bias(module) is not None else None
            self.leaves += [lambda: matrix(module), *([constant] if constant is not None else [])]
            if id(module) in self.names:
                if any(step.kind == "site" and step.name == self.names[id(module)] for step in self.steps):
                    raise NotAChainError(f"{name} runs more than once")
                self._add(node, Step("site", (source,), self.names[id(module)], constant=constant))
                return
            # without its hooks: if they change anything, the chain's output is seen to differ from the target's
            run = functools.partial(type(module).forward, module)
            self._add(node, Step("linear", (source,), name, run, lambda: matrix(module), constant))
        elif type(module) in ELEMENTWISE_MODULES:
            if getattr(module, "inplace", False):
                raise NotAChainError(f"{name} works in place")
            self._add(node, Step("elementwise", (source,), name, module, is_relu=type(module) is nn.ReLU))
        elif isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):  # a target is run in evaluation mode
            self.numbers[node] = source
        else:
            raise NotAChainError(f"{name} is a {type(module).__name__}")

    def _function(self, node: fx.Node) -> None:
        function, args, kwargs = node.target, list(node.args), dict(node.kwargs)
        name = str(function) if node.op == "call_method" else getattr(function, "__name__", str(function))
        values = [self.numbers.get(a) if isinstance(a, fx.Node) else None for a in args]
        constants = [self.constants.get(a) if isinstance(a, fx.Node) else None for a in args]
        is_add = function in _ADD or (node.op == "call_method" and function in ("add", "add_"))
        is_matmul = function in _MATMUL or (node.op == "call_method" and function == "matmul")
        if is_add and len(args) == 2 and not kwargs:
            self._sum(node, values, constants, args)
        elif is_matmul and len(args) == 2 and values[0] is not None and constants[1] is not None:
            self._add(node, Step("linear", (values[0],), name, lambda v, m=constants[1]: v @ m(), constants[1]))
        elif function is F.linear and values[0] is not None:
            self._linear(node, values[0], args[1:], kwargs)
        elif (function in ELEMENTWISE or (node.op == "call_method" and function in ELEMENTWISE_METHODS)) and (
            values[0] is not None and not any(isinstance(a, fx.Node) for a in (*args[1:], *kwargs.values()))
        ):
            kwargs.pop("inplace", None)  # a value may be needed again
            run: Any = getattr(torch.Tensor, str(function)) if node.op == "call_method" else function
            rest = args[1:]
            is_relu = function in (torch.relu, F.relu, "relu")
            step = Step("elementwise", (values[0],), name, lambda v: run(v, *rest, **kwargs), is_relu=is_relu)
            self._add(node, step)
        elif function is F.dropout and values[0] is not None and not (args[2:3] or [kwargs.get("training", True)])[0]:
            self.numbers[node] = values[0]
        else:
            raise NotAChainError(f"it calls {name}")

    def _sum(self, node: fx.Node, values: list, constants: list, args: list) -> None:
        numbers = [v for v in values if v is not None]
        if len(numbers) == 2:
            self._add(node, Step("add", tuple(numbers), "add", operator.add))
            return
        other = 1 if values[0] is not None else 0
        constant = constants[other]
        if constant is None:
            raise NotAChainError(f"it adds {type(args[other]).__name__}")
        self._add(node, Step("shift", (numbers[0],), "add", lambda v: v + constant(), constant=constant))

    def _linear(self, node: fx.Node, source: int, args: list, kwargs: dict) -> None:
        weight = args[0] if args else kwargs.get("weight")
        bias = args[1] if len(args) > 1 else kwargs.get("bias")
        if not isinstance(weight, fx.Node) or weight not in self.constants:
            raise NotAChainError("it calls linear on a weight that is not a constant")
        get, shift = self.constants[weight], self.constants.get(bias) if isinstance(bias, fx.Node) else None
        if bias is not None and shift is None:
            raise NotAChainError("it calls linear on a bias that is not a constant")
        run = (lambda v: F.linear(v, get())) if shift is None else (lambda v: F.linear(v, get(), shift()))
        self._add(node, Step("linear", (source,), "linear", run, lambda: get().mT, shift))
