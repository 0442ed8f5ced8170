"""Recovery metrics against hand-worked values, the paper's own numbers and numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastapd import metrics

GOLDEN = Path(__file__).parent / "golden" / "metrics_mmcs_ml2r.npz"


def pentagon(n_instances: int = 1) -> torch.Tensor:
    """Five unit vectors 72 degrees apart, [I, 5, 2] in float64."""
    angle = torch.arange(5, dtype=torch.float64) * 2 * math.pi / 5
    return torch.stack([angle.cos(), angle.sin()], -1).repeat(n_instances, 1, 1)


def perfect(weight: torch.Tensor, order: list[int] | None = None, n_components: int | None = None) -> torch.Tensor:
    """One feature per component; feature f in component order[f]."""
    n_features = weight.shape[1]
    order = list(range(n_features)) if order is None else order
    parts = weight.new_zeros(weight.shape[0], n_components or n_features, *weight.shape[1:])
    for feature, component in enumerate(order):
        parts[:, component, feature] = weight[:, feature]
    return parts


def test_mmcs_ml2r_reproduces_the_reference():
    golden = np.load(GOLDEN)
    weight = torch.as_tensor(golden["W_target_features_x_hidden"])[None]
    parts = torch.as_tensor(golden["component_weights_C_features_hidden"])[None]
    got = metrics.mmcs_ml2r(weight, parts)
    assert got.component[0].tolist() == golden["argmax_component"].tolist()
    # the reference computed these in float32, so its cosines near 1 are off by up to 1e-7
    assert got.mmcs.item() == pytest.approx(golden["mmcs"].item(), rel=1e-7)
    assert got.ml2r.item() == pytest.approx(golden["ml2r"].item(), rel=1e-7)
    assert got.cosine.std().item() == pytest.approx(golden["mmcs_std_over_features"].item(), abs=1e-7)
    assert got.ratio.std().item() == pytest.approx(golden["ml2r_std_over_features"].item(), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mmcs_ml2r_matches_numpy(dtype):
    rng = np.random.default_rng(0)
    W, P = rng.normal(size=(3, 7, 4)), rng.normal(size=(3, 9, 7, 4))
    weight, parts = torch.tensor(W, dtype=dtype), torch.tensor(P, dtype=dtype)
    W, P = weight.double().numpy(), parts.double().numpy()
    norm = np.linalg.norm(P, axis=-1)
    cosine = (P * W[:, None]).sum(-1) / (norm * np.linalg.norm(W, axis=-1)[:, None])  # [I, C, F]
    best = cosine.argmax(1)
    ratio = np.take_along_axis(norm, best[:, None], 1)[:, 0] / np.linalg.norm(W, axis=-1)
    got = metrics.mmcs_ml2r(weight, parts)
    assert got.mmcs.dtype == torch.float64
    assert np.array_equal(got.component.numpy(), best)
    for ours, theirs in (
        (got.cosine, cosine.max(1)),
        (got.ratio, ratio),
        (got.mmcs, cosine.max(1).mean(-1)),
        (got.ml2r, ratio.mean(-1)),
    ):
        assert np.linalg.norm(ours.numpy() - theirs) <= 1e-12 * np.linalg.norm(theirs)


def test_mmcs_ml2r_zero_rows_are_not_nan():
    weight = pentagon()
    weight[0, 3] = 0
    parts = perfect(weight)
    parts[0, 1, 1] = 0  # nothing carries feature 1
    got = metrics.mmcs_ml2r(weight, parts)
    assert got.cosine[0].tolist() == pytest.approx([1, 0, 1, 0, 1])
    assert got.ratio[0].tolist() == pytest.approx([1, 0, 1, 0, 1])
    assert got.mmcs.item() == pytest.approx(0.6)


def test_feature_recovery_of_a_perfect_split():
    weight = pentagon(2)
    order = [3, 0, 4, 1, 2]
    got = metrics.feature_recovery(weight, perfect(weight, order))
    assert got.assignment.tolist() == [order, order]
    assert got.mmcs.tolist() == pytest.approx([1, 1])
    assert got.ml2r.tolist() == pytest.approx([1, 1])
    assert got.leak.tolist() == [0, 0]
    assert got.unique.tolist() == [5, 5]
    assert got.dead.tolist() == [0, 0]
    assert got.faithfulness_error.tolist() == [0, 0]
    assert metrics.recovered(got).tolist() == [True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_feature_recovery_of_copies_is_not_recovery(dtype):
    weight = pentagon().to(dtype)
    got = metrics.feature_recovery(weight, metrics.copies_parts(weight, 5))
    assert got.mmcs.item() == pytest.approx(1.0)
    assert got.ml2r.item() == pytest.approx(0.2)
    assert got.leak.item() == pytest.approx(0.8)
    assert got.unique.item() == 1
    assert sorted(got.assignment[0].tolist()) == [0, 1, 2, 3, 4]
    assert got.faithfulness_error.item() < 1e-6
    assert not metrics.recovered(got).item()


def test_feature_recovery_of_nearly_equal_copies_counts_one():
    weight = pentagon()
    parts = metrics.copies_parts(weight, 5)
    for c in range(5):  # rounding that favours another feature in each copy
        parts[0, c, c] *= 1 + 1e-9
    assert metrics.feature_recovery(weight, parts).unique.item() == 1


def test_feature_recovery_of_the_svd():
    weight = pentagon()
    got = metrics.feature_recovery(weight, metrics.svd_parts(weight, 5))
    # a rank-one part of the pentagon spreads its energy as cos² over five directions: 2.5 in all, at most 1 on one
    assert 0.6 - 1e-12 <= got.leak.item() < 1
    assert got.unique.item() <= 2
    assert got.dead.item() == 3
    assert got.faithfulness_error.item() < 1e-12
    assert not metrics.recovered(got).item()


def test_feature_recovery_leak_by_hand():
    weight = torch.eye(2, dtype=torch.float64)[None]
    parts = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    parts[0, 0, 0, 0], parts[0, 0, 1, 1] = 1, 0.5  # energies 1 and 0.25: leak 0.2
    parts[0, 1, 1, 1] = 0.5
    got = metrics.feature_recovery(weight, parts)
    assert got.assignment.tolist() == [[0, 1]]
    assert got.leak.item() == pytest.approx(0.2)
    assert got.unique.item() == 2
    assert got.ml2r.item() == pytest.approx(0.75)
    assert metrics.projection_share(weight, parts)[0].tolist() == [[1, 0], [0.5, 0.5]]
    assert metrics.projection_share(2 * weight, parts)[0].tolist() == [[0.5, 0], [0.25, 0.25]]


def test_feature_recovery_is_never_judged_by_dead_components():
    weight = pentagon()
    parts = perfect(weight, n_components=7)
    parts[0, 5] = 1e-9 * weight[0]
    got = metrics.feature_recovery(weight, parts)
    assert (got.dead.item(), got.unique.item(), got.leak.item()) == (2, 5, 0)
    assert metrics.recovered(got).item()

    parts = perfect(weight)
    parts[0, 2] = 0  # its feature is carried by nobody; the leak of the others is still 0
    got = metrics.feature_recovery(weight, parts)
    assert (got.dead.item(), got.unique.item(), got.leak.item()) == (1, 4, 0)
    assert not metrics.recovered(got).item()


def test_feature_recovery_of_nothing():
    weight = pentagon()
    got = metrics.feature_recovery(weight, torch.zeros(1, 5, 5, 2))
    assert (got.dead.item(), got.unique.item(), got.leak.item()) == (5, 0, 1)
    assert (got.mmcs.item(), got.ml2r.item(), got.faithfulness_error.item()) == (0, 0, 1)
    got = metrics.feature_recovery(torch.zeros(1, 5, 2), torch.zeros(1, 5, 5, 2))
    assert not any(value.double().isnan().any() for value in got)
    assert not metrics.recovered(got).item()


def test_feature_recovery_with_fewer_components_than_features():
    weight = pentagon()
    parts = perfect(weight)[:, :3]
    got = metrics.feature_recovery(weight, parts)
    assert got.assignment[0].tolist() == [0, 1, 2, -1, -1]
    assert (got.unique.item(), got.leak.item()) == (3, 0)
    assert got.faithfulness_error.item() == pytest.approx(math.sqrt(2 / 5))
    assert not metrics.recovered(got).item()


def test_feature_recovery_of_a_diverged_instance_leaves_the_others_alone():
    weight = pentagon(3)
    parts = perfect(weight)
    parts[1, 2] = math.nan
    parts[2, 0, 0, 0] = math.inf
    got = metrics.feature_recovery(weight, parts)
    assert metrics.recovered(got).tolist() == [True, False, False]
    assert math.isnan(got.mmcs[1].item())
    assert math.isnan(got.leak[1].item())


# each damage breaks one condition and leaves the other four intact
DAMAGE = {
    "mmcs": ({"mmcs": 0.98}, {"mmcs": 0.9801}),
    "unique": ({"unique": 4}, {"unique": 5}),
    "leak": ({"leak": 0.1}, {"leak": 0.0999}),
    "ml2r": ({"ml2r": 0.8499}, {"ml2r": 0.85}),
    "faithfulness_error": ({"faithfulness_error": 0.0101}, {"faithfulness_error": 0.01}),
    "nan": ({"mmcs": math.nan}, {}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_recovered_needs_every_condition(name):
    weight = pentagon()
    good = metrics.feature_recovery(weight, perfect(weight))
    for changes, expected in zip(DAMAGE[name], (False, True), strict=True):
        changed = good._replace(
            **{key: torch.tensor([v], dtype=getattr(good, key).dtype) for key, v in changes.items()}
        )
        assert metrics.recovered(changed).item() is expected


def test_recovered_rejects_each_damaged_decomposition():
    weight = pentagon(5)
    parts = perfect(weight)
    parts[0, :, :, 1] += parts[0, :, :, 0] * 0.5  # turned: MMCS
    parts[1, 0, 0], parts[1, 1, 0] = 0, weight[1, 0]  # two features in one component: unique, leak
    parts[2, 0, 1] = 0.6 * weight[2, 1]  # feature 1 shared with component 0
    parts[2, 1, 1] = 0.4 * weight[2, 1]
    parts[3] *= 0.8  # short: ML2R
    parts[4] *= 0.98  # not faithful, all else well
    got = metrics.feature_recovery(weight, parts)
    assert metrics.recovered(got).tolist() == [False] * 5
    assert got.mmcs[0] < 0.98
    assert got.unique[1] <= 4
    assert got.leak[1].item() == pytest.approx(0.5)
    assert got.leak[2].item() == pytest.approx(0.36 / 1.36)
    assert got.ml2r[3].item() == pytest.approx(0.8)
    assert got.faithfulness_error[4].item() == pytest.approx(0.02)
    loose = metrics.RecoveryThresholds(faithfulness_error=0.03)
    assert metrics.recovered(got, loose).tolist() == [False] * 4 + [True]


def test_svd_parts_sum_to_the_target_and_have_rank_one():
    weight = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = metrics.svd_parts(weight, 7)
    assert parts.shape == (2, 7, 6, 4)
    assert (parts.sum(1) - weight).norm() <= 1e-12 * weight.norm()
    assert parts[:, 4:].abs().max() == 0
    theirs = np.linalg.svd(weight.numpy(), compute_uv=False)
    ours = parts.flatten(2).norm(dim=-1)[:, :4].numpy()
    assert np.linalg.norm(ours - theirs) <= 1e-12 * np.linalg.norm(theirs)
    assert (torch.linalg.svdvals(parts)[..., 1:] <= 1e-12 * weight.norm()).all()
    # fewer components than singular values: what is missing shows as the error
    got = metrics.feature_recovery(weight, metrics.svd_parts(weight, 3)).faithfulness_error.numpy()
    assert got == pytest.approx(theirs[:, 3] / np.linalg.norm(theirs, axis=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("n_components", "rank"), [(5, 2), (3, 4), (1, 5)])
def test_factors_multiply_to_the_parts(n_components, rank, dtype):
    weight = pentagon(2).to(dtype)
    weight[1, 2] *= 1.7
    for parts, (A, B) in (
        (metrics.svd_parts(weight, n_components), metrics.svd_factors(weight, n_components, rank)),
        (metrics.copies_parts(weight, n_components), metrics.copies_factors(weight, n_components, rank)),
    ):
        assert A.shape == (2, n_components, 5, rank)
        assert B.shape == (2, n_components, rank, 2)
        assert A.dtype == B.dtype == parts.dtype == dtype
        assert (A @ B - parts).norm() <= 8 * torch.finfo(dtype).eps * weight.norm()


def test_copies_factors_refuse_a_rank_that_is_too_small():
    with pytest.raises(ValueError, match=r"copies_factors: rank must be at least the rank of weight \(2\), got 1"):
        metrics.copies_factors(pentagon(), 5, 1)
    line = pentagon()[:, :, :1] * torch.tensor([1.0, 2.0])  # rank one: one column is enough
    A, B = metrics.copies_factors(line, 5, 1)
    assert (A @ B).sum(1) == pytest.approx(line, abs=1e-12)


def test_l0_and_alive_by_hand():
    counts = torch.tensor([[4, 0, 2], [0, 0, 0]], dtype=torch.int32)
    assert metrics.l0(counts, 4).tolist() == [1.5, 0]
    assert metrics.alive(counts).tolist() == [2, 0]
    assert metrics.l0(torch.zeros(1, 3, dtype=torch.int32), 0).tolist() == [0]


def test_relative_faithfulness_by_hand():
    weights = {"a": torch.tensor([[[3.0]], [[0.0]]]), "b": torch.tensor([[[0.0, 4.0]], [[0.0, 0.0]]])}
    sums = {"b": torch.tensor([[[0.0, 3.0]], [[0.0, 0.0]]]), "a": weights["a"]}
    assert metrics.relative_faithfulness(weights, sums).tolist() == pytest.approx([0.2, 0])
    assert metrics.relative_faithfulness(weights, weights).tolist() == [0, 0]
    # three rank-one pieces of gain 5 for the matrix 5 I: off by half its norm (spec, section 3)
    five = 5 * torch.eye(2)[None]
    assert metrics.relative_faithfulness({"w": five}, {"w": 1.5 * five}).item() == pytest.approx(0.5)


def test_metrics_refuse_what_they_cannot_judge():
    weight, parts = pentagon(), perfect(pentagon())
    for call in (metrics.mmcs_ml2r, metrics.feature_recovery, metrics.projection_share):
        with pytest.raises(ValueError, match=r"weight must have shape .*got \[5, 2\]"):
            call(weight[0], parts)
        with pytest.raises(ValueError, match=r"parts must have shape \[1, n_components, 5, 2\] .*got \[1, 5, 2, 5\]"):
            call(weight, parts.mT)
        with pytest.raises(TypeError, match=r"parts must be floating point, got torch\.int64"):
            call(weight, parts.long())
    with pytest.raises(TypeError, match="weight must be floating point"):
        metrics.svd_parts(weight.long(), 5)
    with pytest.raises(ValueError, match="svd_parts: n_components must be at least 1, got 0"):
        metrics.svd_parts(weight, 0)
    with pytest.raises(ValueError, match="svd_factors: rank must be at least 1, got 0"):
        metrics.svd_factors(weight, 2, 0)
    with pytest.raises(ValueError, match=r"sums must have the layers of weights \['a'\], got \['b'\]"):
        metrics.relative_faithfulness({"a": weight}, {"b": weight})
    with pytest.raises(ValueError, match=r"sums\['a'\] must have shape \[1, 5, 2\], got \[1, 2, 5\]"):
        metrics.relative_faithfulness({"a": weight}, {"a": weight.mT})
