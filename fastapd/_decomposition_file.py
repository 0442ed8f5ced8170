"""The file of a decomposition: safetensors with the factors, and texts that say what they are the components of.

Tensors are `<layer>.A` [n_instances, C, d_in, m] and `<layer>.B` [n_instances, C, m, d_out] of untied layers. Texts:

    format    "fastapd-components-1": name and version in one; a reader refuses all others
    ties      "linear2=linear1,..": layers whose matrix is the transpose of another's
    fastapd   version of the package that wrote it
    target    class of the target
    made      how the components came about
    method    the method, as JSON
    sha256    of every decomposed matrix of the target, as JSON: {"0": "ab12.."}

A run directory holds the same file under the name `components.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastapd._masks import refuse
from fastapd._rundir import read_metrics
from fastapd.model import ComponentModel

if TYPE_CHECKING:
    from fastapd.config import APD

FORMAT = "fastapd-components-"
VERSION = "1"
IN_RUN = "components.safetensors"


class Held(NamedTuple):
    """What a file says, checked as far as it can be without a target."""

    factors: dict[str, tuple[Tensor, Tensor]]
    ties: dict[str, str]
    method: APD | None
    made: str
    target: str
    hashes: dict[str, str]
    history: list[dict[str, Any]]


def digest(W: Tensor) -> str:
    """SHA-256 of a matrix [n_instances, d_in, d_out]: its dtype, its shape and its numbers, little-endian."""
    W = W.detach().cpu().contiguous()
    head = f"{str(W.dtype).removeprefix('torch.')} {list(W.shape)}\n".encode()
    return hashlib.sha256(head + W.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def texts(model: ComponentModel, method: APD, made: str) -> dict[str, str]:
    """What the file says of its tensors."""
    import fastapd

    ties = model.components.ties
    return {
        "format": FORMAT + VERSION,
        "ties": ",".join(f"{a}={b}" for a, b in ties.items()),
        "fastapd": fastapd.__version__,
        "target": type(model.target).__name__,
        "made": made,
        "method": method.model_dump_json(),
        "sha256": json.dumps({name: digest(W) for name, W in model.weights.items()}),
    }


def write(path: str | Path, model: ComponentModel, method: APD, made: str) -> Path:
    """Writes the file, whole or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(refuse("path", "end in .safetensors", repr(str(path))))
    if not path.parent.is_dir():
        raise FileNotFoundError(refuse("path", "lie in a directory that exists", str(path)))
    tensors = {name: t.cpu() for name, t in model.components.export().items()}
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata=texts(model, method, made))
        temporary.chmod(mode)  # the usual one; safetensors makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def read(path: str | Path) -> Held:
    """Reads a file, or the one of a run directory.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of another kind or of another version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    history: list[dict[str, Any]] = []
    if path.is_dir():
        if not (path / IN_RUN).is_file():
            raise FileNotFoundError(refuse("path", f"be a file or a run directory with {IN_RUN}", f"{path} without"))
        history = read_metrics(path) if (path / "metrics.jsonl").is_file() else []
        path = path / IN_RUN
    if not path.is_file():
        raise FileNotFoundError(refuse("path", "be a file that save wrote, or a run directory", f"nothing at {path}"))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = dict(file.metadata() or {})
            _check_format(found.get("format"), path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        hint = f"in {path}; was it copied to its end?"
        raise ValueError(refuse("path", "be a whole safetensors file", str(error), hint)) from None
    try:
        return Held(
            _pairs(tensors),
            dict(_tie(text) for text in found.get("ties", "").split(",") if text),
            _method(found.get("method")),
            found.get("made", ""),
            found.get("target", ""),
            dict(json.loads(found.get("sha256", "{}"))),
            history,
        )
    except (ValueError, TypeError) as error:  # json's errors are ValueErrors, and so are pydantic's
        raise ValueError(refuse("path", f"be a file that save wrote, as {path} says it is", error)) from None


def check_weights(held: Held, model: ComponentModel) -> None:
    """Refuses a target whose matrices are not those that the file's components were made for."""
    hint = "pass strict=False to put the components on this model all the same"
    weights = model.weights
    unknown = [name for name in weights if name not in held.hashes]
    if unknown:
        raise ValueError(refuse("path", f"say which weights layers {', '.join(unknown)} had", "a file without", hint))
    other = [name for name, W in weights.items() if digest(W) != held.hashes[name]]
    if other:
        condition = "have the weights that the components were made for"
        raise ValueError(refuse("model", condition, f"others in {', '.join(other)}", hint))


def check_shapes(held: Held, model: nn.Module) -> None:
    """Refuses a target that lacks the file's layers, or has them in other sizes."""
    from fastapd._making import sites_of

    sites = {site.name: site for site in sites_of(model, [*held.factors, *held.ties])}
    for name, (A, B) in held.factors.items():
        wanted = [A.shape[0], A.shape[2], B.shape[3]]
        got = list(sites[name].weight.shape)
        if got != wanted:
            raise ValueError(refuse("model", f"have {wanted} [n_instances, d_in, d_out] in layer {name}", got))
    for name, owner in held.ties.items():
        if sites[name].tied_to != owner.removeprefix("="):
            got = f"{sites[name].tied_to or 'a matrix of its own'}"
            raise ValueError(refuse("model", f"tie layer {name} to {owner.removeprefix('=')}", got))


def _check_format(said: str | None, path: Path) -> None:
    if said == FORMAT + VERSION:
        return
    if said is not None and said.startswith(FORMAT):
        condition = f"be of version {VERSION}, which this fastapd reads"
        raise ValueError(refuse("path", condition, f"version {said.removeprefix(FORMAT)[:20]} in {path}"))
    what = "a safetensors file of no known format" if said is None else f"a safetensors file of format {said[:40]!r}"
    hint = "a target's weights go into the target, with load_state_dict"
    raise ValueError(refuse("path", "be a file that Decomposition.save wrote", f"{what}: {path}", hint))


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in sorted(tensors)))
    if sorted(f"{name}.{kind}" for name in names for kind in "AB") != sorted(tensors) or not names:
        raise ValueError(f"tensors {sorted(tensors)[:6]}, where every layer should have .A and .B")
    return {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}


def _tie(text: str) -> tuple[str, str]:
    name, equals, owner = text.partition("=")
    if not (name and equals and owner):
        raise ValueError(f"the tie {text[:40]!r}")
    return name, owner


def _method(text: str | None) -> APD | None:
    from fastapd.config import APD

    return None if text is None else APD(**json.loads(text))
