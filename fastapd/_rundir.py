"""The directory of a run: who owns it, and files in it that are whole or absent whenever the process stops.

A name is claimed by `mkdir`, which one process wins. A file appears by renaming a finished temporary file beside it.
Metrics are appended, one line a row, so that a crash costs at most the last line.
"""

from __future__ import annotations

import csv
import io
import json
import math
import numbers
import os
import platform
import re
import secrets
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata as _metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")  # `$` would accept "name\n"
_RUNS = Path("runs")
_FOLDERS = ("figures", "eval")
State = Literal["running", "finished", "interrupted", "failed", "diverged"]


def _refuse(what: str, condition: str, got: str, hint: str = "") -> str:
    return f"run directory: {what} must {condition}, got {got}{'; ' if hint else ''}{hint}"


def _plain(value: Any, what: str) -> Any:
    """`value` as JSON can hold it: numpy and torch values as Python's, non-finite floats as None."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(_refuse(f"a key in {what}", "be text", repr(key)[:80]))
        return {key: _plain(item, what) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, what) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else None
    if hasattr(value, "tolist"):  # arrays, tensors, numpy.bool
        return _plain(value.tolist(), what)
    raise TypeError(_refuse(f"a value in {what}", "have a form in JSON", type(value).__name__))


def _json(value: Any, what: str, indent: int | None = None) -> str:
    try:
        return json.dumps(_plain(value, what), allow_nan=False, indent=indent) + "\n"
    except RecursionError:
        raise ValueError(_refuse(what, "nest less deeply", "too many levels, or itself inside itself")) from None


def _cell(value: Any) -> str:
    """One CSV cell; text that a spreadsheet would run as a formula is marked as text with a leading '."""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
    return "" if value is None else json.dumps(value)  # of a number, this is its repr


def _csv_line(cells: list[str]) -> bytes:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\r\n").writerow(cells)  # it quotes cells with a character of its line end
    return line.getvalue().removesuffix("\r\n").encode("utf-8", "backslashreplace") + b"\n"


def _append(file: io.FileIO, data: bytes) -> None:
    """Write all of `data` or none of it: half a line in the middle of a file would damage the lines after it."""
    start = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except BaseException:
        file.truncate(start)
        raise


class RunDirectory:
    """A directory that one run owns and writes to. Make one with `RunDirectory.create`.

    Attributes:
        path: the directory; pictures go to `path / "figures"`, evaluations to `path / "eval"`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] | None = None
        self._files: dict[str, io.FileIO] = {}
        self._closed = False

    @classmethod
    def create(cls, path: str | Path | None, default: str) -> RunDirectory:
        """Claim a directory that no other run has.

        Args:
            path: the directory to use, made with its parents where it is missing; None for `runs/<default>`, or
                `runs/<default>-2`, `-3`, ... where that is taken.
            default: a name of 1 to 100 letters, digits or `. _ -`, starting with a letter or digit.

        Raises:
            ValueError: `default` is not such a name, or `path` is empty text or has a null character.
            FileExistsError: `path` is there and not an empty directory.
        """
        if not NAME.match(default):
            condition = "be 1 to 100 letters, digits or . _ -, starting with a letter or digit"
            raise ValueError(_refuse("default", condition, repr(default)[:120]))
        if path is None:
            return cls(cls._claim_default(default))
        if not str(path) or "\0" in str(path):
            raise ValueError(_refuse("path", "be a path", repr(str(path))))
        path = Path(path)
        needs, hint = "be missing or an empty directory", "choose another directory or remove this one"
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise FileExistsError(_refuse("path", needs, f"a file in the way: {path}", hint)) from None
        if any(path.iterdir()):
            raise FileExistsError(_refuse("path", needs, f"files in {path}", hint))
        try:
            for folder in _FOLDERS:
                (path / folder).mkdir()
        except FileExistsError:  # another process took it since the line above
            raise FileExistsError(_refuse("path", needs, f"another run in {path}", hint)) from None
        return cls(path)

    @staticmethod
    def _claim_default(name: str) -> Path:
        try:
            _RUNS.mkdir(exist_ok=True)
        except FileExistsError:
            raise FileExistsError(_refuse(str(_RUNS), "be a directory", "a file", "pass a path")) from None
        path, count = _RUNS / name, 1
        while True:
            try:
                path.mkdir()
                break
            except FileExistsError:
                count += 1
                path = _RUNS / f"{name}-{count}"
        for folder in _FOLDERS:
            (path / folder).mkdir()
        return path

    def _member(self, name: str) -> Path:
        folder, _, file = str(name).rpartition("/")
        if folder not in ("", *_FOLDERS) or not NAME.match(file) or str(name).startswith("/"):
            condition = "be a plain file name (letters, digits, . _ -), alone or in figures/ or eval/"
            raise ValueError(_refuse("name", condition, repr(name)[:120]))
        return self.path / name

    def _replace(self, name: str, write: Callable[[Path], object], sync: bool = True) -> Path:
        """Let `write` fill a temporary file, then give it its name: a reader sees the old file or the new one."""
        path = self._member(name)
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # the usual one; safetensors makes files that only their owner can read
            if sync:  # or a power failure after the rename can leave an empty file
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write `text` in UTF-8, atomically, over a file of that name if there is one.

        Args:
            name: a file name, alone or after `figures/` or `eval/`.
            text: what the file is to hold; line ends are kept.

        Returns:
            The file's path.

        Raises:
            ValueError: `name` is not such a name.
        """
        data = text.encode()
        return self._replace(name, lambda temporary: temporary.write_bytes(data))

    def write_json(self, name: str, obj: Any) -> Path:
        """Write `obj` as JSON, atomically. Non-finite floats become null; arrays and tensors become lists.

        Raises:
            ValueError: `name` is not a file name, or `obj` nests too deeply.
            TypeError: `obj` holds something that JSON has no form for, or a key that is not text.
        """
        return self.write_text(name, _json(obj, name, indent=2))

    def save_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
        """Write tensors as safetensors, atomically. Tensors that share memory are written once each.

        Args:
            name: a file name that ends in `.safetensors`.
            tensors: dense tensors of any device and strides.
            metadata: texts to keep with them (see `load_metadata`).

        Raises:
            ValueError: `name` is not such a name.
            TypeError: something other than dense tensors with values, or metadata that is not text.
        """
        import torch
        from safetensors.torch import save_file

        if not str(name).endswith(".safetensors"):
            raise ValueError(_refuse("name", "end in .safetensors", repr(name)[:120]))
        ready: dict[str, Tensor] = {}
        storages: set[int] = set()
        for key, tensor in tensors.items():
            dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta
            if not dense or not isinstance(key, str) or key == "__metadata__":
                got = f"{type(tensor).__name__} under {key!r}"
                raise TypeError(_refuse("tensors", "map texts (not '__metadata__') to dense tensors", got))
            tensor = tensor.detach().cpu().contiguous()
            if tensor.untyped_storage().data_ptr() in storages:  # safetensors refuses shared memory
                tensor = tensor.clone()
            storages.add(tensor.untyped_storage().data_ptr())
            ready[key] = tensor
        if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
            raise TypeError(_refuse("metadata", "map texts to texts", repr(metadata)[:120]))
        return self._replace(name, lambda temporary: save_file(ready, temporary, metadata=metadata))

    def log(self, row: dict[str, Any]) -> None:
        """Append a row of metrics to `metrics.jsonl`, and its scalars to `metrics.csv`.

        The first row fixes the columns of the CSV file; lists and mappings are in the JSONL file only. Non-finite
        floats are null in the one and an empty cell in the other. Text that a spreadsheet would take for a formula
        gets a leading `'` in the CSV file.

        Raises:
            ValueError: the row is empty, its scalars have other keys than the first row's, or `close` was called.
            TypeError: the row is not a dict, or holds something that JSON has no form for.
        """
        if not isinstance(row, dict):
            raise TypeError(_refuse("row", "be a dict", type(row).__name__))
        if not row:
            raise ValueError(_refuse("row", "have at least one key", "none"))
        if self._closed:
            raise ValueError(_refuse("log", "be called before close", "a call after it"))
        line = _json(row, "row").encode()
        row = json.loads(line)
        scalars = {key: value for key, value in row.items() if not isinstance(value, list | dict)}
        columns = list(scalars) if self._columns is None else self._columns
        if scalars.keys() != set(columns):
            missing, new = sorted(set(columns) - scalars.keys()), sorted(scalars.keys() - set(columns))
            got = " and ".join(f"{word} {keys}" for word, keys in (("without", missing), ("also", new)) if keys)
            raise ValueError(_refuse("row", "have the scalar keys of the first row", f"one {got}"))
        table = _csv_line([_cell(scalars[key]) for key in columns])
        if self._columns is None:
            for name in ("metrics.jsonl", "metrics.csv"):
                self._files[name] = (self.path / name).open("ab", buffering=0)
            table = _csv_line([_cell(key) for key in columns]) + table
            self._columns = columns
        _append(self._files["metrics.jsonl"], line)
        if columns:
            _append(self._files["metrics.csv"], table)

    def set_status(self, state: State, step: int, steps: int, message: str = "") -> None:
        """Write `status.json`: how far the run is, at what time (UTC), and why it stopped.

        Raises:
            ValueError: `state` is not one of the five, or not 0 <= step <= steps.
        """
        if state not in get_args(State):
            raise ValueError(_refuse("state", f"be one of {', '.join(get_args(State))}", repr(state)[:80]))
        if not 0 <= step <= steps:
            raise ValueError(_refuse("step", f"be in [0, steps = {steps}]", repr(step)))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        status = {"state": state, "step": step, "steps": steps, "message": str(message), "updated": now}
        data = _json(status, "status", indent=2).encode()
        self._replace("status.json", lambda temporary: temporary.write_bytes(data), sync=False)  # often, worth little

    def close(self) -> None:
        """Close the metrics files; rows logged are already in them. A second call does nothing."""
        self._closed = True
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not safetensors.
    """
    return _open_tensors(path, lambda file: {key: file.get_tensor(key) for key in file.keys()})


def load_metadata(path: str | Path) -> dict[str, str]:
    """The texts kept in a safetensors file; raises as `load_tensors`."""
    return _open_tensors(path, lambda file: dict(file.metadata() or {}))


def _open_tensors(path: str | Path, read: Callable[[Any], Any]) -> Any:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(_refuse("path", "be a safetensors file", f"nothing at {path}"))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return read(file)
    except SafetensorError as exc:
        raise ValueError(_refuse(str(path), "be a whole safetensors file", str(exc))) from None


def _strict(value: Any) -> dict[str, Any]:
    """For `json.loads`: pairs without repeated keys as a dict; refuses the constants NaN and Infinity (text here)."""
    if isinstance(value, str) or len(dict(value)) != len(value):
        raise ValueError(f"the constant {value}" if isinstance(value, str) else "a repeated key")
    return dict(value)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, or of the one in a run directory.

    A last line without its end, which a crash leaves, is ignored unless the row on it is whole.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: any other line is not a JSON object; names the file and the line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode(), parse_constant=_strict, object_pairs_hook=_strict)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}")
        except (ValueError, RecursionError) as exc:
            if number == len(lines):
                break
            raise ValueError(_refuse(f"{path} line {number}", "be a JSON object", str(exc))) from None
        rows.append(row)
    return rows


def _version(name: str) -> str | None:
    try:
        return _metadata.version(name)
    except _metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):  # x86 only
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def environment() -> dict[str, Any]:
    """What a result may depend on besides its configuration; no user name, host name or path."""
    import numpy
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": "-".join(filter(None, (platform.system(), *platform.libc_ver()))),  # a release can name its builder
        "machine": platform.machine(),
        "cpu": _cpu(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "triton": _version("triton") or _version("pytorch-triton"),
        "fastapd": _version("fastapd") or getattr(sys.modules.get("fastapd"), "__version__", None),
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }
