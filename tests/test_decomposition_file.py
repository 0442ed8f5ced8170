"""Decompositions on disk: what is loaded is what was saved, to the bit, and nothing else is taken for one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastapd
from fastapd import APD, Decomposition
from fastapd._decomposition_file import digest
from fastapd._rundir import RunDirectory, load_metadata, load_tensors
from fastapd.experiments.tms import TMS

METHOD = APD(topk=1.5, p=0.7, attribution="ablation")


def _mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).to(dtype).requires_grad_(False)


def _of(target: nn.Module) -> Decomposition:
    if isinstance(target, TMS):
        factors = {"linear1": (torch.randn(2, 4, 5, 2), torch.randn(2, 4, 2, 2))}
        return Decomposition.from_factors(target, factors, METHOD, {"linear2": "linear1"})
    return Decomposition.from_matrices(target, {"0": torch.randn(4, 5, 6), "2": torch.randn(4, 6, 3)}, method=METHOD)


def _tms() -> TMS:
    target = TMS(2, 5, 2)
    nn.init.normal_(target.linear1.weight)
    return target.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [_mlp, _tms])
def test_decomposition_file_gives_back_what_was_saved(make, dtype, tmp_path):
    target = make().to(dtype)
    found = _of(target)
    path = tmp_path / "a file.safetensors"
    found.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a file.safetensors"]
    other = copy.deepcopy(target)
    again = Decomposition.load(path, other)
    assert again.model.target is other and again.method == METHOD and again.made == found.made
    assert list(again.model.components.layers.items()) == list(found.model.components.layers.items())
    held = again.model.components.export()
    for name, t in found.model.components.export().items():
        assert torch.equal(held[name], t) and held[name].dtype == dtype
    x = torch.rand(2, 7, 5, dtype=dtype)
    assert torch.equal(again(x, [1, 3]), found(x, [1, 3]))
    assert "loaded from a file.safetensors" in repr(again)
    again.save(str(path))
    assert load_metadata(path)["made"] == found.made


def test_decomposition_file_says_what_it_is(tmp_path):
    target = _tms()
    _of(target).save(tmp_path / "tms.safetensors")
    said = load_metadata(tmp_path / "tms.safetensors")
    assert json.loads(said.pop("method")) == METHOD.model_dump()
    W = target.linear1.weight
    assert json.loads(said.pop("sha256")) == {"linear1": digest(W), "linear2": digest(W.mT)}
    assert said == {
        "format": "fastapd-components-1",
        "ties": "linear2=linear1",
        "fastapd": fastapd.__version__,
        "target": "TMS",
        "made": "given factors",
    }
    assert set(load_tensors(tmp_path / "tms.safetensors")) == {"linear1.A", "linear1.B"}


def test_decomposition_file_digest_depends_on_numbers_shape_and_dtype():
    W = torch.randn(1, 4, 6)
    others = [W.mT, W.view(1, 6, 4), W.double(), W + 1e-7, W.view(2, 2, 6), -W]
    assert len({digest(W), *map(digest, others)}) == 7
    assert digest(W) == digest(W.mT.contiguous().mT) == digest(W.clone().requires_grad_())
    assert digest(W.bfloat16()) != digest(W.half())


def test_decomposition_file_of_a_run_directory(tmp_path):
    target = _tms()
    data = [torch.rand(2, 16, 5) for _ in range(3)]
    options = {"steps": 4, "log_every": 2, "rank": 2, "method": APD(topk=1.0)}
    found = fastapd.decompose(target, data, ["linear*"], 3, out=tmp_path / "run", **options)
    again = Decomposition.load(tmp_path / "run", target)
    assert again.history == found.history and [row["step"] for row in again.history] == [0, 2, 4]
    assert again.method == found.method and again.made == found.made == "training, 4 steps"
    held = again.model.components.export()
    assert all(torch.equal(t, held[name]) for name, t in found.model.components.export().items())
    alone = Decomposition.load(str(tmp_path / "run" / "components.safetensors"), target)
    assert alone.made == "training, 4 steps" and alone.history == []
    state = load_tensors(tmp_path / "run" / "target.safetensors")
    assert load_metadata(tmp_path / "run" / "target.safetensors") == {"format": "fastapd-target-1"}
    assert all(torch.equal(t, state[name]) for name, t in target.state_dict().items())


def test_decomposition_save_takes_a_run_directory(tmp_path):
    found = _of(_mlp())
    with RunDirectory.create(tmp_path / "run", "run") as run:
        found.save(run)
    assert load_metadata(tmp_path / "run" / "components.safetensors")["ties"] == ""
    assert torch.equal(Decomposition.load(tmp_path / "run", found.model.target).parts("0"), found.parts("0"))


def test_decomposition_load_of_a_model_with_other_weights(tmp_path):
    target = _mlp()
    found = _of(target)
    found.save(tmp_path / "mlp.safetensors")
    other = copy.deepcopy(target)
    other[0].bias += 1  # no decomposed matrix
    Decomposition.load(tmp_path / "mlp.safetensors", other)
    other[2].weight[0, 0] += 1e-4
    with pytest.raises(ValueError) as caught:
        Decomposition.load(tmp_path / "mlp.safetensors", other)
    assert str(caught.value) == (
        "Decomposition: model must have the weights that the components were made for, got others in 2; "
        "pass strict=False to put the components on this model all the same"
    )
    again = Decomposition.load(tmp_path / "mlp.safetensors", other, strict=False)
    assert torch.equal(again.parts("2"), found.parts("2"))
    with pytest.raises(ValueError, match="got others in 0, 2"):
        Decomposition.load(tmp_path / "mlp.safetensors", target.double())
    assert Decomposition.load(tmp_path / "mlp.safetensors", target, strict=False).parts("0").dtype == torch.float64


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.Linear(5, 6)), "model must have a layer '2', got Sequential with 0"),
        (
            nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4)),
            "model must have [1, 6, 3] [n_instances, d_in, d_out] in layer 2, got [1, 6, 4]",
        ),
        (
            nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(3, 6)),
            "model must have [1, 5, 6] [n_instances, d_in, d_out] in layer 0, got [1, 6, 5]",
        ),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_decomposition_load_refuses_a_model_that_does_not_fit(model, message, strict, tmp_path):
    _of(_mlp()).save(tmp_path / "mlp.safetensors")
    with pytest.raises(ValueError) as caught:
        Decomposition.load(tmp_path / "mlp.safetensors", model, strict)
    assert str(caught.value) == f"Decomposition: {message}"


def test_decomposition_load_refuses_a_model_that_is_tied_otherwise(tmp_path):
    _of(_tms()).save(tmp_path / "tms.safetensors")

    class Untied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear1, self.linear2 = fastapd.model.Linear(2, 5, 2), fastapd.model.Linear(2, 2, 5)

    with pytest.raises(ValueError, match="model must tie layer linear2 to linear1, got a matrix of its own"):
        Decomposition.load(tmp_path / "tms.safetensors", Untied(), strict=False)
    with pytest.raises(TypeError, match=r"^Decomposition: model must be an nn.Module, got dict$"):
        Decomposition.load(tmp_path / "tms.safetensors", {})


SAVE = "be a file that Decomposition.save wrote"


@pytest.mark.parametrize(
    "metadata, message",
    [
        (None, f"path must {SAVE}, got a safetensors file of no known format: "),
        ({"format": "pt"}, f"path must {SAVE}, got a safetensors file of format 'pt': "),  # transformers writes this
        ({"format": "fastapd-target-1"}, f"path must {SAVE}, got a safetensors file of format 'fastapd-target-1'"),
        ({"format": "fastapd-components-2"}, "path must be of version 1, which this fastapd reads, got version 2 in "),
        ({"format": "fastapd-components-1"}, "path must be a file that save wrote, as "),  # without factors
    ],
)
def test_decomposition_load_refuses_other_safetensors(metadata, message, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"0.weight": torch.randn(6, 5)}, path, metadata=metadata)
    with pytest.raises(ValueError) as caught:
        Decomposition.load(path, _mlp())
    assert str(caught.value).startswith(f"Decomposition: {message}")


@pytest.mark.parametrize(
    "change",
    [{"ties": "linear2"}, {"method": "{"}, {"method": '{"topk": -1}'}, {"method": '{"unknown": 1}'}, {"method": "[1]"},
     {"sha256": "[1]"}, {"sha256": "x"}],
)  # fmt: skip
def test_decomposition_load_refuses_damaged_texts(change, tmp_path):
    path = tmp_path / "mlp.safetensors"
    _of(_mlp()).save(path)
    save_file(load_tensors(path), path, metadata=load_metadata(path) | change)
    with pytest.raises(ValueError, match=r"^Decomposition: path must be a file that save wrote, as "):
        Decomposition.load(path, _mlp())


def test_decomposition_load_without_hashes_is_not_strict(tmp_path):
    target, path = _mlp(), tmp_path / "mlp.safetensors"
    _of(target).save(path)
    save_file(load_tensors(path), path, metadata={"format": "fastapd-components-1", "ties": ""})
    with pytest.raises(ValueError, match=r"^Decomposition: path must say which weights layers 0, 2 had, got a file"):
        Decomposition.load(path, target)
    assert Decomposition.load(path, target, strict=False).method == APD(topk=1.0)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_decomposition_load_refuses_a_file_cut_short(keep, tmp_path):
    target, path = _mlp(), tmp_path / "mlp.safetensors"
    _of(target).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"^Decomposition: path must be a whole safetensors file, got "):
        Decomposition.load(path, target)


def test_decomposition_load_and_save_refuse_paths(tmp_path):
    found = _of(_mlp())
    with pytest.raises(FileNotFoundError, match=r"^Decomposition: path must be a file that save wrote, or a run"):
        Decomposition.load(tmp_path / "nothing.safetensors", _mlp())
    with pytest.raises(FileNotFoundError, match=r"^Decomposition: path must be a file or a run directory with comp"):
        Decomposition.load(tmp_path, _mlp())
    with pytest.raises(ValueError, match=r"^Decomposition: path must end in .safetensors, got 'mlp.pt'$"):
        found.save("mlp.pt")
    with pytest.raises(FileNotFoundError, match=r"^Decomposition: path must lie in a directory that exists"):
        found.save(tmp_path / "no" / "mlp.safetensors")
    assert not list(tmp_path.iterdir())
