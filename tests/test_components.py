"""Components: layout, initialisation, ties, unit norm, what files hold, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch

from fastapd.components import Components, LayerShape

MLP = {"mlp.in": LayerShape(6, 4), "mlp.out": LayerShape(4, 3)}
TIED = {"encode": LayerShape(5, 2), "decode": LayerShape(2, 5, "encode")}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random_factors(*widths: tuple[int, int], I: int = 2, C: int = 3, m: int = 2) -> list[tuple]:
    return [
        (torch.randn(I, C, d_in, m, dtype=torch.float64), torch.randn(I, C, m, d_out, dtype=torch.float64))
        for d_in, d_out in widths
    ]


# ---- layout


def test_components_factors_have_the_documented_shapes():
    given = Components(MLP, n_components=7, rank=2, n_instances=3)
    for name, layer in MLP.items():
        A, B = given.factors(name)
        assert A.shape == (3, 7, layer.d_in, 2)
        assert B.shape == (3, 7, 2, layer.d_out)
        assert given.parts(name).shape == (3, 7, layer.d_in, layer.d_out)
        assert given.weight(name).shape == (3, layer.d_in, layer.d_out)


def test_components_store_A_transposed_and_contiguous():
    given = Components(MLP, n_components=7, rank=2, n_instances=3)
    A, B = given.factors("mlp.in")
    stored = {p.data_ptr(): p for p in given.parameters()}
    assert len(stored) == 4
    assert A.data_ptr() in stored and B.data_ptr() in stored  # views of the parameters, no copies
    assert stored[A.data_ptr()].shape == (3, 7, 2, 6)
    assert stored[A.data_ptr()].is_contiguous() and stored[B.data_ptr()].is_contiguous()
    assert A.mT.is_contiguous()
    assert all(p.is_leaf and p.requires_grad for p in stored.values())


def test_components_weight_is_the_sum_of_parts_and_differentiable():
    given = Components.from_factors({"layer": _random_factors((4, 3))[0]})
    A, B = given.factors("layer")
    expected = sum(A[:, c] @ B[:, c] for c in range(3))
    torch.testing.assert_close(given.weight("layer"), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(given.parts("layer").sum(1), expected, rtol=1e-12, atol=1e-12)
    given.weight("layer").sum().backward()
    assert all(p.grad is not None for p in given.parameters())


@pytest.mark.parametrize("name", ["keys", "values", "type", "a.b.c", "training"])
def test_components_take_any_layer_name(name):
    given = Components({name: LayerShape(3, 2)}, n_components=2)
    given.normalise_()
    assert set(given.export()) == {f"{name}.A", f"{name}.B"}
    assert len(list(given.parameters())) == 2


# ---- initialisation


def test_components_are_reproducible_from_a_generator():
    first, again, other = (Components(MLP, 4, 2, 2, generator=_generator(seed)) for seed in (1, 1, 2))
    for name, value in first.export().items():
        assert torch.equal(value, again.export()[name])
        assert not torch.equal(value, other.export()[name])


def test_components_drawn_from_a_generator_leave_the_default_stream_alone():
    before = torch.get_rng_state()
    Components(MLP, 4, 2, 2, generator=_generator())
    assert torch.equal(before, torch.get_rng_state())


def test_components_without_a_generator_follow_torch_manual_seed():
    torch.manual_seed(5)
    first = Components(MLP, 4).export()
    torch.manual_seed(5)
    again = Components(MLP, 4).export()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_components_initial_deviations_follow_the_xavier_rule(scale):
    C, n, m, d_in, d_out = 7, 3, 5, 400, 300
    given = Components({"layer": LayerShape(d_in, d_out)}, C, m, n, scale, _generator(), dtype=torch.float64)
    A, B = given.factors("layer")
    for factor, width in ((A, d_in), (B, d_out)):
        expected = scale * math.sqrt(2 / ((C + n) * width * m))
        count = factor.numel()
        assert abs(factor.mean()) < 5 * expected / math.sqrt(count)
        assert abs(factor.std() / expected - 1) < 5 / math.sqrt(2 * count)  # five standard errors: 1.7 % at most


def test_components_default_rank_is_full():
    assert Components({"a": LayerShape(8, 3)}, 2).rank == 3
    assert Components({"a": LayerShape(8, 3), "b": LayerShape(5, 9)}, 2).rank == 5
    assert Components({"a": LayerShape(8, 3)}, 2, rank=11).rank == 11


def test_components_take_a_dtype():
    given = Components(MLP, 2, dtype=torch.float64)
    assert {p.dtype for p in given.parameters()} == {torch.float64}
    assert {p.dtype for p in Components(MLP, 2).parameters()} == {torch.float32}


# ---- ties


def test_components_tied_layers_are_the_same_buffers_with_swapped_roles():
    given = Components(TIED, 3, 2, 2, generator=_generator())
    assert len(list(given.parameters())) == 2
    (A1, B1), (A2, B2) = given.factors("encode"), given.factors("decode")
    assert A2.data_ptr() == B1.data_ptr() and B2.data_ptr() == A1.data_ptr()
    assert A2.shape == (2, 3, 2, 2) and B2.shape == (2, 3, 2, 5)
    torch.testing.assert_close(given.weight("decode"), given.weight("encode").mT)
    torch.testing.assert_close(given.parts("decode"), given.parts("encode").mT)


def test_components_multiplicity_counts_the_uses_of_each_buffer():
    assert Components(TIED, 3).multiplicity == {"encode": 2}
    assert Components(MLP, 3).multiplicity == {"mlp.in": 1, "mlp.out": 1}
    twice = {**TIED, "other": LayerShape(4, 4), "again": LayerShape(2, 5, "encode")}
    assert Components(twice, 3).multiplicity == {"encode": 3, "other": 1}


# ---- given factors


def test_components_from_factors_copy():
    A, B = _random_factors((4, 3))[0]
    given = Components.from_factors({"layer": (A, B)})
    for own, other in zip(given.factors("layer"), (A, B), strict=True):
        assert torch.equal(own, other) and own.dtype == other.dtype
    wanted = A.clone()
    A.zero_()
    assert torch.equal(given.factors("layer")[0], wanted)
    with torch.no_grad():
        given.factors("layer")[1].zero_()
    assert B.abs().min() > 0


def test_components_from_factors_take_their_sizes():
    first, second = _random_factors((6, 4), (4, 3))
    given = Components.from_factors({"mlp.in": first, "mlp.out": second})
    assert given.layers == MLP
    assert (given.n_instances, given.n_components, given.rank) == (2, 3, 2)
    tied = Components.from_factors({"encode": _random_factors((5, 2))[0]}, {"decode": "encode"})
    assert tied.layers == TIED


def test_components_from_factors_refuse_misfits():
    (A, B), (A2, B2) = _random_factors((6, 4), (4, 3))
    cases = [
        ({"l": (A, B[:, :2])}, None, r"factors of l must have shape \(2, 3, 2, 4\), got \(2, 2, 2, 4\)"),
        ({"l": (A, B[:, :, :1])}, None, r"factors of l must have shape \(2, 3, 2, 4\), got \(2, 3, 1, 4\)"),
        ({"l": (A, B[:1])}, None, r"factors of l must have shape \(2, 3, 2, 4\), got \(1, 3, 2, 4\)"),
        # A is named by its public shape [I, C, d_in, m], not by the stored one
        ({"l": (A, B), "k": (A2[:1], B2)}, None, r"factors of k must have shape \(2, 3, 4, 2\), got \(1, 3, 4, 2\)"),
        ({"l": (A[0], B[0])}, None, r"factors of l must have 4 axes, got \(3, 6, 2\) and \(3, 2, 4\)"),
        ({}, None, "factors must not be empty, got none"),
        ({"l": (A, B)}, {"k": "nobody"}, "k must be tied to an untied layer, got 'nobody'"),
    ]
    for factors, ties, message in cases:
        with pytest.raises(ValueError, match=rf"^Components: {message}"):
            Components.from_factors(factors, ties)


def test_components_export_round_trip():
    first, second = _random_factors((6, 4), (4, 3))
    given = Components.from_factors({"mlp.in": first, "mlp.out": second})
    held = given.export()
    assert list(held) == ["mlp.in.A", "mlp.in.B", "mlp.out.A", "mlp.out.B"]
    assert all(t.is_contiguous() and not t.requires_grad for t in held.values())
    assert torch.equal(held["mlp.in.A"], first[0]) and torch.equal(held["mlp.out.B"], second[1])
    again = Components.from_factors({name: (held[f"{name}.A"], held[f"{name}.B"]) for name in MLP})
    assert all(torch.equal(value, again.export()[key]) for key, value in held.items())


def test_components_export_holds_copies():
    for rank in (1, 2):
        given = Components(MLP, 3, rank)
        held = given.export()
        before = {key: value.clone() for key, value in held.items()}
        with torch.no_grad():
            for p in given.parameters():
                p.zero_()
        assert all(torch.equal(value, before[key]) for key, value in held.items())


def test_components_export_holds_tied_layers_once():
    assert list(Components(TIED, 3).export()) == ["encode.A", "encode.B"]


# ---- unit norm


def test_components_normalise_gives_unit_columns_of_the_same_direction():
    first, second = _random_factors((6, 4), (4, 3))
    given = Components.from_factors({"mlp.in": first, "mlp.out": second})
    given.normalise_()
    for name, (A, B) in (("mlp.in", first), ("mlp.out", second)):
        own, own_B = given.factors(name)
        torch.testing.assert_close(own, A / A.square().sum(-2, keepdim=True).sqrt(), rtol=1e-14, atol=0)
        assert torch.equal(own_B, B)


def test_components_normalise_keeps_a_zero_column_zero():
    A, B = _random_factors((4, 3))[0]
    A[0, 1, :, 0] = 0
    given = Components.from_factors({"layer": (A, B)})
    given.normalise_()
    own = given.factors("layer")[0]
    assert own.isfinite().all()
    assert torch.equal(own[0, 1, :, 0], torch.zeros(4, dtype=torch.float64))
    norms = own.norm(dim=-2)
    assert int((norms == 0).sum()) == 1
    torch.testing.assert_close(norms[norms > 0], torch.ones(11, dtype=torch.float64))


def test_components_tangent_gradients_are_orthogonal_to_A_and_leave_B_alone():
    given = Components.from_factors({"layer": _random_factors((4, 3))[0]})
    given.normalise_()
    given.weight("layer").square().sum().backward()
    before = {name: p.grad.clone() for name, p in given.named_parameters()}
    given.tangent_gradients_()
    At, grad = given.At["layer"].detach(), given.At["layer"].grad
    along = (grad * At).sum(-1)
    assert along.abs().max() < 1e-13 * before["At.layer"].abs().max()
    expected = before["At.layer"] - (before["At.layer"] * At).sum(-1, keepdim=True) * At
    torch.testing.assert_close(grad, expected, rtol=1e-13, atol=1e-13)
    assert grad.norm() > 0.1 * before["At.layer"].norm()  # most of a gradient is left
    assert torch.equal(given.B["layer"].grad, before["B.layer"])


def test_components_tangent_gradients_without_gradients_do_nothing():
    given = Components(MLP, 2)
    given.tangent_gradients_()
    assert all(p.grad is None for p in given.parameters())


# ---- what is refused


@pytest.mark.parametrize(
    "layers, sizes, message",
    [
        ({}, {}, "layers must not be empty, got none"),
        (MLP, {"n_components": 0}, "n_components must be at least 1, got 0"),
        (MLP, {"rank": 0}, "rank must be at least 1, got 0"),
        (MLP, {"n_instances": -1}, "n_instances must be at least 1, got -1"),
        ({"a": LayerShape(5, 2), "b": LayerShape(2, 5, "c")}, {}, "b must be tied to an untied layer, got 'c'"),
        ({**TIED, "c": LayerShape(5, 2, "decode")}, {}, "c must be tied to an untied layer, got 'decode'"),
        (
            {"a": LayerShape(5, 2), "b": LayerShape(5, 2, "a")},
            {},
            "b [5, 2] must be the transpose of a [5, 2]",
        ),
    ],
)
def test_components_refusals_say_what_and_why(layers, sizes, message):
    with pytest.raises(ValueError, match=rf"^Components: {re.escape(message)}$"):
        Components(layers, **{"n_components": 2, **sizes})


def test_components_repr_says_sizes_and_ties():
    text = repr(Components(TIED, 3, 2, 4))
    assert "n_instances=4, n_components=3, rank=2, layers: encode [5, 2], decode [2, 5] tied" in text
