"""The research code's configuration: its keys, its defaults, what it renamed and what it dropped.

Numbers may be text, as PyYAML reads `1e1` and `7e-1`. What the research code says of a configuration in its log is a
warning here, and what it asserts is an error.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from fastapd._yaml import MAX_BYTES, ConfigError, show

DROPPED = (
    "topk_param_attrib_coeff", "orthog_coeff", "hardcode_topk_mask_step", "pnorm_end", "topk_l2_coeff", "spd_type",
    "sparsity_warmup_pct",
)  # fmt: skip
"""Keys of earlier versions that the research code ignores."""

RENAMED = {"topk_act_recon_coeff": "act_recon_coeff"}


def _whole(value: Any) -> Any:
    """`2e4` and `20_000`, also as text."""
    if isinstance(value, str):
        try:
            value = float(value.replace("_", ""))
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Probability = Annotated[float, Field(ge=0, le=1)]
_Generation = Literal[
    "exactly_one_active", "exactly_two_active", "exactly_three_active", "exactly_four_active", "exactly_five_active",
    "at_least_zero_active",
]  # fmt: skip


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TMSTaskConfig(_Frozen):
    """The decomposition of a toy model of superposition."""

    task_name: Literal["tms"] = "tms"
    feature_probability: _Probability
    train_bias: bool = False
    bias_val: float = 0.0
    data_generation_type: _Generation = "at_least_zero_active"
    pretrained_model_path: str | Path


class ResidualMLPTaskConfig(_Frozen):
    """The decomposition of a residual MLP."""

    task_name: Literal["residual_mlp"] = "residual_mlp"
    feature_probability: _Probability
    init_scale: float = 1.0
    data_generation_type: _Generation = "at_least_zero_active"
    pretrained_model_path: str | Path


class Config(_Frozen):
    """The settings of `spd.run_spd.optimize`, with that class's keys and defaults.

    Raises:
        ConfigError: If a key is unknown, missing or out of range, or settings contradict each other; a line a problem.

    Warns:
        UserWarning: For keys that are renamed or ignored, and for settings that are hardly meant.
    """

    wandb_project: str | None = None
    wandb_run_name: str | None = None
    wandb_run_name_prefix: str = ""
    seed: Annotated[int, BeforeValidator(_whole)] = 0
    topk: _Positive | None = None
    batch_topk: bool = True
    exact_topk: bool = False
    batch_size: _Count
    steps: _Count
    print_freq: _Count
    image_freq: _Count | None = None
    image_on_first_step: bool = True
    slow_images: bool = False
    save_freq: _Count | None = None
    lr: _Positive
    out_recon_coeff: _Coefficient | None = None
    act_recon_coeff: _Coefficient | None = None
    param_match_coeff: _Coefficient | None = 1.0
    topk_recon_coeff: _Coefficient | None = None
    schatten_coeff: _Coefficient | None = None
    schatten_pnorm: _Coefficient | None = None
    lp_sparsity_coeff: _Coefficient | None = None
    distil_from_target: bool = False
    pnorm: _Positive | None = None
    C: _Count
    m: _Count | None = None
    lr_schedule: Literal["linear", "constant", "cosine", "exponential"] = "constant"
    lr_exponential_halflife: _Positive | None = None
    lr_warmup_pct: _Probability = 0.0
    sparsity_loss_type: Literal["jacobian"] = "jacobian"
    unit_norm_matrices: bool = False
    attribution_type: Literal["gradient", "ablation", "activation"] = "gradient"
    task_config: TMSTaskConfig | ResidualMLPTaskConfig = Field(discriminator="task_name")

    _folder: Path | None = PrivateAttr(default=None)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**_current(values))
        except pydantic.ValidationError as error:
            raise ConfigError(_describe(error)) from None
        self._check()

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # pydantic's mark for an __init__ that adds no field

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Reads a configuration file or a run's `final_config.yaml`.

        Raises:
            FileNotFoundError: If there is no such file.
            ConfigError: If it is no YAML mapping, or as for the class.
        """
        path = Path(path)
        config = cls(**read_mapping(path))
        config._folder = path.parent
        return config

    @property
    def target_path(self) -> Path:
        """Where the target's checkpoint is: as written, beside the configuration's file, or where that lies below.

        Raises:
            ValueError: If it is in wandb.
            FileNotFoundError: If it is nowhere.
        """
        given = str(self.task_config.pretrained_model_path)
        if given.startswith("wandb:"):
            raise ValueError(
                f"config: task_config.pretrained_model_path must be a local file, got {given!r}; download the run's "
                "checkpoint and its train config into one folder and name the checkpoint"
            )
        folders = [Path(), *([] if self._folder is None else [self._folder, *self._folder.resolve().parents])]
        for folder in folders:
            if (folder / given).is_file():
                return folder / given
        # a finished run keeps its target beside final_config.yaml
        if self._folder is not None and (beside := self._folder / Path(given).name).is_file():
            return beside
        raise FileNotFoundError(f"config: task_config.pretrained_model_path must be a file, got {given!r}")

    def _check(self) -> None:
        def need(condition: bool, key: str, what: str, got: Any) -> None:
            if not condition:
                raise ConfigError(f"config: {key} must {what}, got {show(got)}")

        topk = self.topk
        need(topk is None or self.batch_topk or topk.is_integer(), "topk", "be whole without batch_topk", topk)
        need(self.topk_recon_coeff is None or topk is not None, "topk", "be given with topk_recon_coeff", topk)
        need(self.lp_sparsity_coeff is None or self.pnorm is not None, "pnorm", "be given with lp_sparsity_coeff", None)
        need(self.schatten_coeff is None or self.schatten_pnorm is not None, "schatten_pnorm",
             "be given with schatten_coeff", None)  # fmt: skip
        need(self.lr_schedule != "exponential" or self.lr_exponential_halflife is not None,
             "lr_exponential_halflife", "be given when lr_schedule is 'exponential'", None)  # fmt: skip
        if topk is not None and self.batch_topk and not (pairs := topk * self.batch_size).is_integer():
            _warn(f"topk * batch_size is {pairs}, of which {int(pairs)} pairs are taken")
        if not self.topk_recon_coeff and not self.lp_sparsity_coeff:
            _warn("neither topk_recon_coeff nor lp_sparsity_coeff is set, so nothing asks for few components")
        if self.param_match_coeff and self.out_recon_coeff:
            _warn("param_match_coeff and out_recon_coeff are both set; usually one is")


def _warn(text: str) -> None:
    warnings.warn(f"config: {text}", stacklevel=4)


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, read as the research code reads it."""
    if not path.is_file():
        raise FileNotFoundError(f"config: {path} must be a file, got {'a directory' if path.is_dir() else 'nothing'}")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"config: {path} must have at most {MAX_BYTES} bytes, got more")
    try:
        values = yaml.safe_load(data)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path} line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"config: {where} must be YAML, got: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config: {path} must hold a mapping, got {show(values)}")
    return {str(key): value for key, value in values.items()}


def _current(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of earlier versions brought up to date."""
    values = dict(values)
    task = values.get("task_config")
    if isinstance(task, BaseModel):
        values["task_config"] = task.model_dump()
    elif isinstance(task, Mapping) and "k" in task:
        task = copy.copy(dict(task))
        values["C"] = task.pop("k")
        values["task_config"] = task
        _warn("task_config.k is now called C")
    for key in [key for key in values if key in DROPPED]:
        _warn(f"{key} is not used any more, got {show(values.pop(key))}")
    for old, new in RENAMED.items():
        if old in values:
            _warn(f"{old} is now called {new}")
            values[new] = values.pop(old)
    return values


_LIMITS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}


def _describe(error: pydantic.ValidationError) -> str:
    """One line for each problem."""
    lines = []
    for problem in error.errors(include_url=False):
        # pydantic has the union's member between the keys; a file does not
        keys = [str(key) for key in problem["loc"]]
        if keys[:1] == ["task_config"]:
            keys = [keys[0], *keys[2:]]
        path, kind, got = ".".join(keys), problem["type"], problem["input"]
        known = {f: None for cls in (Config, TMSTaskConfig, ResidualMLPTaskConfig) for f in cls.model_fields}
        if kind == "extra_forbidden":
            close = difflib.get_close_matches(keys[-1], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(Config.model_fields)}"
            lines.append(f"config: {path} is not a known key; {hint}")
        elif kind == "missing":
            lines.append(f"config: {path} must be given, got nothing")
        elif kind in _LIMITS:
            limit = next(iter(problem.get("ctx", {}).values()))
            lines.append(f"config: {path} must be {_LIMITS[kind]} {limit:g}, got {show(got)}")
        elif kind.startswith("union_tag"):
            lines.append("config: task_config.task_name must be 'tms' or 'residual_mlp', got another")
        else:
            lines.append(f"config: {path} must be valid ({problem['msg']}), got {show(got)}")
    return "\n".join(lines)
