"""The planner: what it reads of a target, and that every formulation of the attributions gives the same numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastapd import ops, planning
from fastapd.attributions import gradient_attributions, output_gradients
from fastapd.components import Components
from fastapd.experiments.residual_mlp import ResidualMLP
from fastapd.experiments.tms import TMS
from fastapd.model import ComponentModel, Linear, Record, TransposedLinear, find_sites
from fastapd.planning import ONES, Form, Plan, SiteChoice, Values

CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def _model(target: nn.Module, patterns: list[str], n_components: int = 3, rank: int = 2) -> ComponentModel:
    """Random components of a target in float64, all of whose parameters and buffers are random."""
    target = target.double().eval()
    with torch.no_grad():
        for t in (*target.parameters(), *target.buffers()):
            t.normal_().mul_(t.shape[-1] ** -0.5)
    sites = find_sites(target, patterns)
    shapes = {s.name: s.shape for s in sites}
    components = Components(shapes, n_components, rank, sites[0].weight.shape[0], 3.0, dtype=torch.float64)
    return ComponentModel(target, sites, components)


def _gradients(model: ComponentModel, a: Tensor) -> list[Tensor]:
    """Of an Lp minimality, by every factor."""
    parameters = list(model.components.parameters())
    total = (a / 2 + 0.1).pow(0.45).sum()
    return list(torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True, materialize_grads=True))


def _reverse(model: ComponentModel, x: Tensor, of_components: bool = False) -> Tensor:
    """The attributions from output gradients, of the target as a module, whatever the planner thinks."""
    chain = model.__dict__.get("chain")
    model.__dict__["chain"] = "not asked here"
    record = model.record_target(x, differentiable=True, of_components=of_components)
    del model.__dict__["chain"]
    if chain is not None:
        model.__dict__["chain"] = chain
    gradients = output_gradients(record)
    names = [site.name for site in model.sites]
    As, Bs = zip(*(model.components.factors(name) for name in names), strict=True)
    return ops.attribution_reduce([record.inputs[n] for n in names], [gradients[n] for n in names], As, Bs)


def _assert_same(model: ComponentModel, a: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(a, wanted, **CLOSE)
    for got, grad in zip(_gradients(model, a), _gradients(model, wanted), strict=True):
        torch.testing.assert_close(got, grad, **CLOSE)


def _parts(model: ComponentModel, x: Tensor) -> tuple[Plan, Form, Record, Values]:
    record = model.record_target(x)
    assert record.found is not None, model.chain
    return model.plan(x), model.form(record.found), record, record.found


def _assert_every_plan_agrees(model: ComponentModel, x: Tensor, most: int = 200) -> int:
    """Attributions and gradients of every combination of choices; returns how many there were."""
    plan, form, _, found = _parts(model, x)
    wanted = _reverse(model, x)
    assert wanted.shape[-1] and wanted.gt(0).any()
    _assert_same(model, gradient_attributions(model, model.record_target(x, plan.form == "reverse")), wanted)
    assert not isinstance(model.chain, str)
    combinations = list(itertools.product(*planning._options(form, model.chain)))
    step = max(1, len(combinations) // most)
    for combination in combinations[::step]:
        sites = tuple(SiteChoice(name, *own) for name, own in zip(form.heads, combination, strict=True))
        a = planning.attributions(
            Plan("tangent", "", sites, {}), form, model.chain, found, model.components, model.sites[0].to_instances
        )
        _assert_same(model, a, wanted)
    return len(combinations[::step])


# ------------------------------------------------------------------------------------------------- kinds of targets


class _Frozen(nn.Module):
    """Linear layers that are not decomposed before, between and after those that are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.between = nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(5, 3, bias=False)
        self.second, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        self.W = nn.Parameter(torch.zeros(2, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.second(self.between(torch.tanh(self.first(self.embed(x))))))) @ self.W


class _Skips(nn.Module):
    """Sums of what comes before, through and around a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = x + torch.sin(x)
        u = self.a(h) + self.shift
        v = torch.tanh(u) + u
        w = self.b(v) + self.c(h) + v + v
        return self.d(F.silu(w) + w) + x


class _Functional(nn.Module):
    """The ways to write a linear layer without a module for it."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(4, 5)
        self.W, self.b = nn.Parameter(torch.zeros(6, 5)), nn.Parameter(torch.zeros(6))
        self.V = nn.Parameter(torch.zeros(3, 6))
        self.register_buffer("U", torch.zeros(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(F.linear(self.site(x), self.W, self.b).tanh(), weight=self.V)
        y = torch.add(y, self.b[:3]).sigmoid()
        return torch.matmul(y, self.V).matmul(self.V.T) @ self.V.transpose(0, 1).contiguous().T @ self.U


def _residual(n_layers: int, n_instances: int = 1, **options: Any) -> Callable[[], nn.Module]:
    return lambda: ResidualMLP(n_instances, 7, 4, 5, n_layers, **options)


LAYERS = ["layers.*.mlp_in", "layers.*.mlp_out"]
# how it is made, what is decomposed, the shape of a batch
TARGETS: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)), ["*[024]"],
            (9, 4)),
    "mlp with an end": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.Sigmoid()), ["[02]"],
                        (9, 4)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3, bias=False)), ["*[012]"],
               (9, 4)),
    "one site of three": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ELU(), nn.Linear(5, 6), nn.Mish(), nn.Linear(6, 3)),
                          ["2"], (9, 4)),
    "first and last": (lambda: nn.Sequential(nn.Linear(4, 5), nn.SELU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)),
                       ["0", "4"], (9, 4)),
    "more outputs than widths": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 11)), ["0"], (9, 4)),
    "shifts before more outputs": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 11)), ["0"], (9, 4)),
    "leading axes": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 6)), ["[02]"], (3, 2, 3, 4)),
    "frozen": (_Frozen, ["first", "second"], (9, 6)),
    "skips": (_Skips, ["a", "b", "d"], (9, 4)),
    "functional": (_Functional, ["site"], (9, 4)),
    "tms": (lambda: TMS(3, 5, 2), ["linear*"], (3, 9, 5)),
    "tms, decoder only": (lambda: TMS(3, 5, 2), ["linear2"], (3, 9, 5)),
    "residual 1": (_residual(1), LAYERS, (1, 9, 7)),
    "residual 2, gelu, bias": (_residual(2, act="gelu", bias=True), LAYERS, (1, 9, 7)),
    "residual 3, instances": (_residual(3, n_instances=2), LAYERS, (2, 9, 7)),
    "residual 2, end": (_residual(2, bias=True, output_act=True), LAYERS, (1, 9, 7)),
    "residual 2, outer": (_residual(2, bias=True), [LAYERS[1]], (1, 9, 7)),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_planning_every_formulation_gives_the_same_attributions_and_gradients(name):
    make, patterns, shape = TARGETS[name]
    model = _model(make(), patterns)
    assert _assert_every_plan_agrees(model, torch.randn(shape, dtype=torch.float64), 64) >= 2


@pytest.mark.parametrize("batch", [1, 2, 17, 65])
def test_planning_batches_of_any_size_have_their_own_plan(batch):
    model = _model(ResidualMLP(1, 7, 4, 5, 2), LAYERS)
    for n in (5, batch, 5):
        x = torch.randn(1, n, 7, dtype=torch.float64)
        _assert_same(model, gradient_attributions(model, model.record_target(x, True)), _reverse(model, x))
    assert [key[0] for key in model._plans] == [(1, 5, 7), (1, batch, 7)]
    assert model.plan(torch.zeros(1, 5, 7, dtype=torch.float64)) is model.plan(torch.ones(1, 5, 7, dtype=torch.float64))


@pytest.mark.parametrize("instances", [True, False])
def test_planning_an_empty_batch_has_no_attributions(instances):
    target = ResidualMLP(2, 7, 4, 5, 2, bias=True) if instances else _Frozen()
    model = _model(target, LAYERS if instances else ["first", "second"])
    x = torch.zeros(*((2, 0, 7) if instances else (0, 6)), dtype=torch.float64)
    a = gradient_attributions(model, model.record_target(x, model.plan(x).form == "reverse"))
    assert a.shape == (2 if instances else 1, 0, 3)
    assert not any(g.any() for g in _gradients(model, a))
    x = torch.randn(*((2, 5, 7) if instances else (5, 6)), dtype=torch.float64)
    _assert_same(model, gradient_attributions(model, model.record_target(x, True)), _reverse(model, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_planning_takes_the_dtype_of_the_target(dtype):
    model = _model(ResidualMLP(1, 7, 4, 5, 2, bias=True), LAYERS)
    x = torch.randn(1, 9, 7, dtype=torch.float64)
    wanted = _reverse(model, x)
    model = ComponentModel(model.target.to(dtype), model.sites, model.components.to(dtype))
    assert model.plan(x.to(dtype)).form == "tangent"
    a = gradient_attributions(model, model.record_target(x.to(dtype)))
    assert a.dtype == dtype
    assert (a - wanted).norm() <= 20 * torch.finfo(dtype).eps * wanted.norm()


# ------------------------------------------------------------------------------------------------------ random chains


class _Network(nn.Module):
    """A chain written as a list: (what, number of the value it takes, and another number)."""

    KINDS = ("site", "site", "linear", "matmul", "shift", "add", "act")
    ACTIVATIONS = (torch.tanh, F.gelu, F.relu, torch.sigmoid, F.silu, torch.sin)
    WIDTHS = (1, 2, 3, 4)

    def __init__(self, d_in: int, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.layers, self.program = nn.ModuleDict(), []
        self.constants = nn.ParameterDict()
        widths = [d_in]
        for what, source, number in [("site", 0, 3), *steps]:
            source, name = source % len(widths), f"{what}{len(widths)}"
            width, other = widths[source], self.WIDTHS[number % 4]
            if what == "add":  # of the latest value of the same width
                number = max(k for k, w in enumerate(widths) if w == width)
                other = width
            elif what == "act":
                number, other = number % len(self.ACTIVATIONS), width
            elif what == "shift":
                self.constants[name], other = nn.Parameter(torch.zeros(width)), width
            elif what == "matmul":
                self.constants[name] = nn.Parameter(torch.zeros(width, other))
            else:
                self.layers[name] = nn.Linear(width, other, bias=number % 3 != 0)
            self.program.append((what, source, number, name))
            widths.append(other)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for what, source, number, name in self.program:
            v = values[source]
            if what == "add":
                values.append(v + values[number])
            elif what == "act":
                values.append(self.ACTIVATIONS[number](v))
            elif what == "shift":
                values.append(v + self.constants[name])
            elif what == "matmul":
                values.append(v @ self.constants[name])
            else:
                values.append(self.layers[name](v))
        return values[-1]


def _needed(target: _Network) -> set[str]:
    """The names of the steps that the output follows from."""
    found, stack = set(), [len(target.program)]
    while stack:
        number = stack.pop()
        if number == 0:
            continue
        what, source, other, name = target.program[number - 1]
        found.add(name)
        stack += [source, other] if what == "add" else [source]
    return found


def test_planning_of_random_chains():
    """Whatever the network: every formulation agrees with output gradients of the module itself."""
    hypothesis = pytest.importorskip("hypothesis", reason="property tests need hypothesis")
    st = hypothesis.strategies
    step = st.tuples(st.sampled_from(_Network.KINDS), st.integers(0, 9), st.integers(0, 11))
    n_sites, plans = set(), 0

    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
    @hypothesis.given(d_in=st.integers(1, 4), steps=st.lists(step, min_size=2, max_size=9), recent=st.booleans())
    def agree(d_in: int, steps: list[tuple[str, int, int]], recent: bool) -> None:
        nonlocal plans
        if recent:  # a deep network instead of a broad one
            steps = [(what, k - source % 2 + 1, number) for k, (what, source, number) in enumerate(steps)]
        target = _Network(d_in, steps)
        sites = [name for name in target.layers if name.startswith("site") and name in _needed(target)]
        if not sites:
            return
        torch.manual_seed(0)
        model = _model(target, [f"layers.{name}" for name in sites])
        x = torch.randn(5, d_in, dtype=torch.float64)
        hypothesis.assume(bool(_reverse(model, x).any()))  # relu may shut everything
        plans += _assert_every_plan_agrees(model, x, 8)
        n_sites.add(len(sites))

    agree()
    assert {1, 2, 3} <= n_sites and plans > 100


# -------------------------------------------------------------------------------------------------------- the choice


def test_planning_takes_reverse_for_few_outputs_of_a_wide_mlp():
    target = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    model = _model(target, ["*[02]"])
    x = torch.randn(20, 30, dtype=torch.float64)
    plan = model.plan(x)
    assert plan.form == "reverse" and plan.sites == ()
    assert plan.costs["reverse"].flops < plan.costs["tangent"].flops
    assert plan.reason == "few outputs: their gradients cost less than tangents"
    _assert_same(model, gradient_attributions(model, model.record_target(x, True)), _reverse(model, x))


def test_planning_counts_flops_by_hand():
    """One layer into one nonlinearity: every option's price, and the cheapest is taken."""
    model = _model(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), ["0"], n_components=4, rank=2)
    x = torch.randn(9, 6, dtype=torch.float64)
    plan, form, _, found = _parts(model, x)
    sizes = planning.Sizes(1, 9, 4, 2, 8)
    prices = {}
    for head, folded, product in planning._options(form, model.chain)[0]:
        cost = planning._tangent_cost(form, found, sizes, [SiteChoice("0", head, folded, product)])
        prices[product] = cost.flops
        assert (head, folded) == ((0,), False)
    assert prices == {False: 2 * 9 * 4 * (6 * 2 + 2 * 5), True: 2 * (4 * 6 * 5 * 2 + 9 * 4 * 6 * 5)}
    assert plan.form == "tangent" and plan.costs["tangent"].flops == min(prices.values())
    assert plan.sites == (SiteChoice("0", (0,), False, False),)
    # reverse: 5 outputs through 6 x 5 entries; then per component 2 * (6 + 5) for x A and g B, 5 * 5 for the squares
    assert plan.costs["reverse"].flops == 2 * 9 * 5 * 30 + 2 * 9 * 4 * (2 * 11 + 5 * 5)
    assert plan.costs["reverse"].n_bytes == 9 * 5 * 5 * 8


def test_planning_chooses_for_each_site_alone_where_there_are_many():
    model = _model(ResidualMLP(1, 7, 4, 5, 3), LAYERS)
    x = torch.randn(1, 9, 7, dtype=torch.float64)
    plan, form, _, found = _parts(model, x)
    assert len(plan.sites) == 6 > planning.SITES_TO_ENUMERATE
    assert model.chain is not None and not isinstance(model.chain, str)
    sizes = planning.Sizes(1, 9, 3, 2, 8)
    for site, options in zip(plan.sites, planning._options(form, model.chain), strict=True):
        costs = [planning._tangent_cost(form, found, sizes, [SiteChoice(site.name, *own)]) for own in options]
        mine = planning._tangent_cost(form, found, sizes, [site])
        assert mine.flops == min(cost.flops for cost in costs)


def test_planning_holds_no_product_that_is_too_large(monkeypatch):
    monkeypatch.setattr(planning, "PRODUCT_ELEMENTS", 10)
    model = _model(ResidualMLP(1, 7, 4, 5, 2), LAYERS, n_components=30)
    plan = model.plan(torch.randn(1, 900, 7, dtype=torch.float64))
    assert plan.form == "tangent" and not any(site.product for site in plan.sites)
    monkeypatch.setattr(planning, "PRODUCT_ELEMENTS", 1 << 26)
    full = _model(ResidualMLP(1, 7, 4, 5, 2), LAYERS, n_components=30, rank=4)
    assert any(site.product for site in full.plan(torch.randn(1, 900, 7, dtype=torch.float64)).sites)


def test_planning_folds_a_narrow_input_and_its_constants_into_A():
    """A head with a bias starts from the input and a column of ones."""
    target = nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model = _model(target, ["1", "3"])
    x = torch.randn(9, 2, dtype=torch.float64)
    _, form, _, found = _parts(model, x)
    assert model.chain is not None and not isinstance(model.chain, str)
    assert {name: sorted(head) for name, head in form.heads.items()} == {"1": [ONES, 0], "3": [3]}
    weight, bias = target[0].weight.T, target[0].bias
    torch.testing.assert_close(form.heads["1"][0][0], weight.detach(), **CLOSE)
    torch.testing.assert_close(form.heads["1"][ONES][0, 0], bias.detach(), **CLOSE)
    options = planning._options(form, model.chain)
    assert [(head, folded) for head, folded, _ in options[0]] == [((1,), False)] * 2 + [((ONES, 0), True)] * 2
    values = planning._head_values((ONES, 0), found, model.sites[0].to_instances)
    assert values.shape == (1, 9, 3) and values[..., 0].eq(1).all() and values[0, :, 1:].equal(x)


def test_planning_of_a_residual_mlp_reaches_every_later_barrier():
    model = _model(ResidualMLP(1, 7, 4, 5, 2), LAYERS)
    _, form, _, _ = _parts(model, torch.randn(1, 9, 7, dtype=torch.float64))
    assert form.widths == [5, 5, 4]  # the 7 outputs count as their 4 dimensions
    reach = {name: sorted(tails) for name, tails in form.tails.items()}
    assert reach == {
        "layers.0.mlp_in": [0], "layers.0.mlp_out": [1, 2], "layers.1.mlp_in": [1], "layers.1.mlp_out": [2],
    }  # fmt: skip
    assert set(form.links) == {(0, 1), (0, 2), (1, 2)}
    # the squared lengths of what W_U writes are kept by its triangular factor
    W_U = model.target.W_U
    torch.testing.assert_close((R := form.tails["layers.1.mlp_out"][2]) @ R.mT, W_U @ W_U.mT, **CLOSE)


# ------------------------------------------------------------------------------------------ what a model remembers


def test_planning_sees_parameters_that_change_in_place():
    target = _Frozen()
    model = _model(target, ["first", "second"])
    x = torch.randn(9, 6, dtype=torch.float64)
    for changed in ((), (target.embed.weight,), (target.embed.bias, target.first.weight), (target.W,)):
        with torch.no_grad():
            for parameter in changed:
                parameter.mul_(2)
        a = gradient_attributions(model, model.record_target(x, True))
        torch.testing.assert_close(a, _reverse(model, x), **CLOSE)
    target.W = nn.Parameter(target.W.detach() * 3)  # or are replaced
    torch.testing.assert_close(gradient_attributions(model, model.record_target(x, True)), _reverse(model, x), **CLOSE)
    with torch.no_grad():
        target.load_state_dict({name: -t for name, t in target.state_dict().items()})
    torch.testing.assert_close(gradient_attributions(model, model.record_target(x, True)), _reverse(model, x), **CLOSE)


def test_planning_keeps_a_form_as_long_as_nothing_changes(monkeypatch):
    built = []
    right = planning.gated_linear_form
    monkeypatch.setattr("fastapd.model.gated_linear_form", lambda *args: built.append(1) or right(*args))
    model = _model(ResidualMLP(1, 7, 4, 5, 2), LAYERS)
    for n in (5, 5, 6):
        x = torch.randn(1, n, 7, dtype=torch.float64)
        gradient_attributions(model, model.record_target(x))
    assert len(built) == 1


class _Computed(nn.Module):
    """Its second matrix is computed from a parameter, so another tensor every time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.W = nn.Linear(6, 5), nn.Parameter(torch.zeros(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) @ self.W.mul(3).mT


def test_planning_keeps_a_form_whose_constants_are_computed(monkeypatch):
    built = []
    right = planning.gated_linear_form
    monkeypatch.setattr("fastapd.model.gated_linear_form", lambda *args: built.append(1) or right(*args))
    model, x = _model(_Computed(), ["first"]), torch.randn(9, 6, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(gradient_attributions(model, model.record_target(x)), _reverse(model, x), **CLOSE)
    assert model.plan(x).form == "tangent" and len(built) == 1
    with torch.no_grad():
        model.target.W.mul_(2)
    torch.testing.assert_close(gradient_attributions(model, model.record_target(x)), _reverse(model, x), **CLOSE)
    assert len(built) == 2


def test_planning_of_the_component_model_follows_its_components():
    """The matrices between are sums of components there: made anew for every batch, perhaps where the last one was."""
    target = ResidualMLP(1, 7, 4, 5, 2, bias=True)
    model = _model(target, LAYERS)
    x = torch.randn(1, 9, 7, dtype=torch.float64)
    assert model.plan(x).form == "tangent"

    def draw(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.components.parameters():
                parameter.normal_(generator=generator)

    found = []
    for seed in range(20):
        draw(seed)
        found.append(gradient_attributions(model, model.record_target(x, of_components=True)).detach())
    for seed, a in enumerate(found):
        draw(seed)
        torch.testing.assert_close(a, _reverse(model, x, of_components=True), **CLOSE)


def test_planning_keeps_what_a_form_was_made_from():
    """A form is known by where its matrices lie: as long as it is kept, nothing else may lie there."""
    model = _model(ResidualMLP(1, 7, 4, 5, 2), LAYERS)
    found = model.record_target(torch.randn(1, 9, 7, dtype=torch.float64), of_components=True).found
    assert found is not None
    form = model.form(found)
    assert model.form(found) is form
    places = {W.data_ptr() for W in found.weights.values()}
    shapes = [W.shape for W in found.weights.values()]
    del found
    others = [torch.empty(shape, dtype=torch.float64) for shape in shapes * 50]
    assert places.isdisjoint(t.data_ptr() for t in others)


def test_planning_of_computed_constants_follows_their_parameters():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site, self.W = nn.Linear(4, 5), nn.Parameter(torch.zeros(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.site(x)) @ torch.tril(self.W)

    target = Tied()
    model = _model(target, ["site"])
    x = torch.randn(9, 4, dtype=torch.float64)
    for _ in range(20):
        with torch.no_grad():
            target.W.normal_()
        a = gradient_attributions(model, model.record_target(x, True))
        torch.testing.assert_close(a, _reverse(model, x), **CLOSE)
    assert not isinstance(model.chain, str)


# ------------------------------------------------------------------------------------------------ what is no chain


class _Module(nn.Module):
    """One site, then whatever a function does with it and with the module's other parts."""

    def __init__(self, then: Callable[..., Any]) -> None:
        super().__init__()
        self.site, self.linear, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.inplace, self.dropout, self.conv = nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv1d(3, 3, 1)
        self.p, self.positions, self.narrow = (nn.Parameter(torch.zeros(*s)) for s in ((4,), (6, 4), (4, 1)))
        self.register_buffer("buffer", torch.zeros(2, 4))
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self, self.site(x))


NO_CHAINS: dict[str, tuple[Callable[..., Any], str]] = {
    "softmax": (lambda m, y: m.linear(torch.softmax(y, -1)), "it calls softmax"),
    "normalisation": (lambda m, y: m.norm(y), "norm is a LayerNorm"),
    "two values multiplied": (lambda m, y: y * m.linear(y), "it calls mul"),
    "two values by matrix": (lambda m, y: y @ m.linear(y), "it calls matmul"),
    "a number added": (lambda m, y: y + 1, "it adds int"),
    "in place": (lambda m, y: m.linear(m.inplace(m.linear(y))), "inplace works in place"),
    "dropout": (lambda m, y: F.dropout(y, 0.5), "it calls dropout"),
    "a view": (lambda m, y: y.flip(-1), "it calls flip"),
    "a subtraction": (lambda m, y: m.p - y, "it calls sub"),
    "two outputs": (lambda m, y: (y, torch.tanh(y)), "its output is not one tensor that depends on its input"),
    "a dictionary": (lambda m, y: {"y": y}, "its output is not one tensor that depends on its input"),
    "a constant": (lambda m, y: m.p, "its output is not one tensor that depends on its input"),
    "a weight that is a value": (lambda m, y: F.linear(y, y), "it calls linear on a weight that is not a constant"),
    "a branch on data": (lambda m, y: y if y.sum() > 0 else -y, "it cannot be traced: TraceError: symbolically traced "
                         "variables cannot be used as inputs to control flow"),
    "a matrix times a value": (lambda m, y: m.linear.weight @ y, "it calls matmul"),
    "a layer of a constant": (lambda m, y: y + m.linear(m.p), "linear runs on a constant"),
    "a site that runs twice": (lambda m, y: m.site(torch.tanh(y)), "site runs more than once"),
    "a tensor of its own": (lambda m, y: y + torch.ones(4, dtype=torch.float64), "it makes a tensor of its own"),
    "a part of a buffer": (lambda m, y: y + m.buffer[0], "it makes a tensor of its own"),
    "random numbers": (lambda m, y: y + torch.randn(4, dtype=torch.float64), "it makes a tensor of its own"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CHAINS)
def test_planning_says_what_is_no_chain(name):
    then, reason = NO_CHAINS[name]
    model = _model(_Module(then), ["site"])
    before = set(model.target.__dict__)
    assert model.chain == reason
    assert set(model.target.__dict__) == before
    plan = model.plan(torch.randn(4, 4, dtype=torch.float64)) if name not in ("two outputs", "a dictionary") else None
    if plan is not None:
        words = f"the target is not a chain of linear maps and nonlinearities: {reason}"
        assert plan == Plan("reverse", words, (), {})


@pytest.mark.parametrize("name", ["normalisation", "two values multiplied", "a number added", "softmax", "a view"])
def test_planning_of_what_is_no_chain_takes_output_gradients(name):
    model = _model(_Module(NO_CHAINS[name][0]), ["site"])
    x = torch.randn(4, 4, dtype=torch.float64)
    a = gradient_attributions(model, model.record_target(x, True))
    _assert_same(model, a, _reverse(model, x))
    assert a.any()


def test_planning_says_that_a_target_with_two_inputs_is_no_chain_and_one_with_dropout_is():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.site(x)

    assert _model(Two(), ["site"]).chain == "it takes more than one input"
    target = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Identity(), nn.Linear(4, 2))
    assert not isinstance(_model(target, ["0"]).chain, str)  # in evaluation mode it does nothing
    model = _model(target, ["0"])
    target.train()
    assert not isinstance(model.chain, str) and target[1].training
    attention = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8))
    assert isinstance(_model(attention, ["0"]).chain, str)
    mixed = nn.Sequential(nn.Linear(4, 4), Linear(1, 4, 4))
    assert _model(mixed, ["0", "1"]).chain == "only some of its layers have an axis of instances"


# what a step does that is not the same for every sample, or not elementwise: each would be wrong as a linear form
BROADCASTS: dict[str, tuple[Callable[..., Any], str]] = {
    "positions": (lambda m, y: m.linear(m.linear(y) + m.positions), "add takes a constant of shape [6, 4]"),
    "a width of one and four": (lambda m, y: torch.tanh(y @ m.narrow) + m.p, "add broadcasts a value"),
    "values of two widths": (lambda m, y: torch.tanh(y @ m.narrow) + y, "add broadcasts a value"),
    "more axes": (lambda m, y: torch.tanh(y) + m.positions[:, None], "add broadcasts a value"),
    "a vector": (lambda m, y: torch.matmul(torch.tanh(y), m.p), "matmul takes a constant of shape [4]"),
}


@pytest.mark.parametrize("name", BROADCASTS)
def test_planning_of_what_broadcasts_takes_output_gradients(name):
    model = _model(_Module(BROADCASTS[name][0]), ["site"])
    x = torch.randn(6, 4, dtype=torch.float64)
    plan = model.plan(x)
    assert plan.form == "reverse"
    assert plan.reason == f"the target is not a chain of linear maps and nonlinearities: {BROADCASTS[name][1]}"
    if name not in ("more axes", "a vector"):  # whose outputs no form takes
        _assert_same(model, gradient_attributions(model, model.record_target(x, True)), _reverse(model, x))


def test_planning_of_a_batch_axis_in_a_constant_takes_output_gradients():
    """[n_instances, batch, width] constants fit one batch size; matrices of another leading axis fit none."""

    class Wide(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.site, self.c = Linear(2, 4, 4), nn.Parameter(torch.zeros(*shape))
            self.is_matrix = shape[-2] == 4

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.site(x))
            return y @ self.c if self.is_matrix else torch.tanh(y + self.c)

    x = torch.randn(2, 6, 4, dtype=torch.float64)
    for shape, form in (((2, 6, 4), "reverse"), ((2, 1, 4), "tangent"), ((1, 4), "tangent"), ((6, 4), "reverse"),
                        ((2, 4, 3), "tangent"), ((1, 4, 3), "tangent"), ((4, 3), "tangent")):  # fmt: skip
        model = _model(Wide(*shape), ["site"], n_components=2, rank=1)
        chain = model.plan(x).costs != {}
        assert chain == (form == "tangent"), shape
        _assert_same(model, gradient_attributions(model, model.record_target(x, True)), _reverse(model, x))


@pytest.mark.parametrize("where", ["whole", "block", "site", "linear"])
def test_planning_falls_back_where_the_target_does_more_than_its_trace(where):
    """A forward hook that doubles what a module returns does not show in the trace, but in the output."""
    block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    target = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), block, nn.Linear(5, 3))
    hooked = {"whole": target, "block": block, "site": target[0], "linear": block[0]}[where]
    model = _model(target, ["0", "3"])
    handle = hooked.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(9, 4, dtype=torch.float64)
    assert torch.allclose(model.record_target(x).output, target(x))
    plan = model.plan(x)
    assert plan.form == "reverse"
    # torch traces the hooks of a module that it goes into, but not those of the target and of a layer
    reason = "it calls mul" if where == "block" else "run by itself it gives another output than what was traced of it"
    assert plan.reason.endswith(f": {reason}")
    doubled = gradient_attributions(model, model.record_target(x, True))
    _assert_same(model, doubled, _reverse(model, x))
    handle.remove()
    assert not torch.allclose(doubled, _reverse(model, x))


def test_planning_asks_a_batch_with_samples_whether_the_trace_is_right():
    target = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model = _model(target, ["0", "2"])
    target.register_forward_hook(lambda module, args, output: 2 * output)
    empty, x = torch.zeros(0, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    assert gradient_attributions(model, model.record_target(empty, True)).shape == (1, 0, 3)
    _assert_same(model, gradient_attributions(model, model.record_target(x, True)), _reverse(model, x))


def test_planning_runs_in_place_functions_out_of_place():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x), inplace=True)
            y = y + self.b(y)
            y += x
            return F.elu(y, inplace=True)

    model = _model(InPlace(), ["a", "b"])
    x = torch.randn(9, 4, dtype=torch.float64)
    assert not isinstance(model.chain, str)
    assert _assert_every_plan_agrees(model, x) >= 2


def test_planning_notices_a_value_changed_in_place():
    """The sum below reads what the relu has overwritten; a chain of values does not see that."""

    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = F.relu(y, inplace=True)
            return z + y

    model = _model(Alias(), ["a"])
    x = torch.randn(9, 4, dtype=torch.float64)
    record = model.record_target(x)
    assert record.found is None and torch.allclose(record.output, model.target(x))
    assert model.plan(x).form == "reverse"


# --------------------------------------------------------------------------------------------------------- memory


def _peak_bytes(call: Callable[[], Any]) -> int:
    """The most that torch's allocator held at once for one call, beyond what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = profiler.profiler.kineto_results
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = list(itertools.accumulate(e.nbytes() for e in events))
    assert held, "torch reports no memory"
    return max(held)


@pytest.mark.parametrize("minimality", [False, True])
def test_planning_materialises_nothing_of_every_sample_and_component(minimality):
    """Neither [batch, C, width] nor [batch, n_outputs, width] is held; values of the target, factors and result are."""
    batch, C, d = 256, 64, 32
    target = ResidualMLP(1, d, d, d, 2).requires_grad_(False)
    for t in (*target.parameters(), *target.buffers()):
        nn.init.normal_(t, std=d**-0.5)
    sites = find_sites(target, LAYERS)
    components = Components({s.name: s.shape for s in sites}, C, 2)
    model = ComponentModel(target, sites, components)
    x = torch.rand(1, batch, d)

    def step() -> None:
        a = gradient_attributions(model, model.record_target(x))
        if minimality:
            (a + 1e-3).pow(0.45).sum().backward()

    assert model.plan(x).form == "tangent"
    step()
    values = 4 * batch * d * 12  # one for each step of the chain
    factors = 4 * sum(p.numel() for p in components.parameters())
    allowed = 2 * values + 4 * factors + 4 * 4 * batch * C
    assert 4 * batch * C * d > allowed and 4 * batch * d * d > values
    peak = _peak_bytes(step)
    assert 4 * batch * C <= peak <= allowed


def test_planning_transposed_layers_that_are_no_sites_are_linear_maps():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Linear(2, 5, 3)
            self.site, self.decoder = Linear(2, 3, 3), TransposedLinear(self.encoder)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.decoder(torch.tanh(self.site(self.encoder(x)))))

    assert _assert_every_plan_agrees(_model(Decoder(), ["site"]), torch.randn(2, 7, 5, dtype=torch.float64)) == 4
