"""What a run is: the models of its configuration, reading and writing them, and error texts that name the key."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationInfo
from pydantic_core import PydanticCustomError

from fastapd._rundir import NAME
from fastapd._yaml import MAX_BYTES, PLAIN, ConfigError, StrictDumper, loads, show

__all__ = [
    "APD", "ConfigError", "Optimiser", "ResidualMLPTarget", "RunConfig", "TMSTarget", "dump", "format_errors", "load",
    "loads", "parse",
]  # fmt: skip

# ---- values: no text is a number, no boolean is a number, a whole float is an integer (`steps: 2e4`)


def _to_int(value: Any) -> Any:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):  # numpy's integers too
        return int(value)
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if whole else value


def _to_float(value: Any) -> Any:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # an integer beyond 1.8e308
            return math.inf
    return value


def _house(condition: str, got: Any, key: str = "") -> PydanticCustomError:
    """An error for `_describe`; `key` names the key at fault where it is not the validated one."""
    return PydanticCustomError("house", "must {condition}", {"condition": condition, "got": got, "key": key})


_Int = Annotated[int, BeforeValidator(_to_int), Strict()]
_Float = Annotated[float, BeforeValidator(_to_float), Strict(), Field(allow_inf_nan=False)]
_Count = Annotated[_Int, Field(ge=1, lt=2**31)]
_Positive = Annotated[_Float, Field(gt=0)]
_Coefficient = Annotated[_Float, Field(ge=0)]
_Name = Annotated[str, Strict(), Field(pattern=NAME)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, revalidate_instances="always")

    def __init__(self, **values: Any) -> None:
        """Raises ConfigError, also where tyro builds a section. Sections in a mapping do not pass through here."""
        try:
            super().__init__(**values)
        except pydantic.ValidationError as exc:
            raise ConfigError(format_errors(exc)) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # pydantic's mark for the sentence above


class APD(_Model):
    """The method: how components are selected and what the loss is made of. A term of coefficient 0 is not computed."""

    topk: _Coefficient | None = Field(
        description="active components per sample, on average over the batch (>= 0); none: all on, weighted (Lp form)"
    )
    selection: Literal["batch", "sample", "exact"] = Field(
        default="batch", description="take the largest of a batch, of each sample, or as many as inputs are active"
    )
    distil_from_target: bool = Field(
        default=False, strict=True, description="the last component is always on, unranked"
    )
    attribution: Literal["gradient", "activation", "ablation"] = Field(
        default="gradient", description="measure of a component's effect"
    )
    attribution_model: Literal["target", "components"] = Field(
        default="target", description="whose activations and output gradients gradient attributions use"
    )
    attribution_probes: _Count | None = Field(
        default=None,
        description="gradient attributions may be estimated from so many random directions (>= 1); none: exact",
    )
    attribution_refined: _Count | None = Field(
        default=None, description="of estimated attributions, so many of each sample are computed exactly (>= 1)"
    )
    attribution_norm: bool = Field(
        default=False, strict=True, description="report sqrt(mean over outputs), as the paper"
    )
    faithfulness: _Coefficient = Field(default=1.0, description="coefficient: components sum to the target weights")
    minimality: _Coefficient = Field(default=1.0, description="coefficient: the active components reproduce the output")
    simplicity: _Coefficient = Field(default=1.0, description="coefficient: the active components have low rank")
    p: _Positive = Field(default=0.9, description="exponent of the Schatten norm in the simplicity term (> 0)")
    schatten: Literal["factored", "exact"] = Field(
        default="factored", description="simplicity from |a||b| (the research code's) or from singular values"
    )
    lp_sparsity: _Coefficient = Field(default=0.0, description="coefficient: attributions are sparse (Lp form)")
    lp_p: _Positive = Field(default=0.9, description="exponent of the attributions in the Lp form (> 0)")
    distance: Literal["mse", "kl"] = Field(default="mse", description="between outputs, in the reconstruction terms")
    output_reconstruction: _Coefficient = Field(
        default=0.0, description="coefficient: all components reproduce the output"
    )
    activation_reconstruction: _Coefficient = Field(
        default=0.0, description="coefficient: active ones reproduce hidden layers"
    )
    unit_norm: bool = Field(default=False, strict=True, description="keep every factor A of unit norm")
    eps: _Positive = Field(default=1e-16, description="added to squared singular values before the power p/2 (> 0)")
    reference_exact_count: bool = Field(
        default=False, strict=True, description="exact selection counts as the research code does, rounding included"
    )

    @pydantic.field_validator("selection")
    @classmethod
    def _whole_topk(cls, selection: str, info: ValidationInfo) -> str:
        topk = info.data.get("topk", 0.0)
        if selection == "sample" and topk is not None and not topk.is_integer():
            raise _house("be a whole number when selection is 'sample'", topk, key="topk")
        return selection

    @pydantic.field_validator("attribution_refined")
    @classmethod
    def _refines_an_estimate(cls, refined: int | None, info: ValidationInfo) -> int | None:
        if refined is not None and "attribution_probes" in info.data and info.data["attribution_probes"] is None:
            raise _house("be left out when attribution_probes is none: they are exact", refined)
        if refined is not None and "topk" in info.data and info.data["topk"] is None:
            raise _house("be left out when topk is none, whose attributions are differentiated", refined)
        return refined

    @pydantic.field_validator("lp_sparsity")
    @classmethod
    def _refined_has_no_gradient(cls, lp_sparsity: float, info: ValidationInfo) -> float:
        if lp_sparsity and info.data.get("attribution_refined") is not None:
            raise _house("be 0 when attribution_refined is given, whose values have no gradient", lp_sparsity)
        return lp_sparsity

    @pydantic.field_validator("schatten")
    @classmethod
    def _exact_needs_selection(cls, schatten: str, info: ValidationInfo) -> str:
        if schatten == "exact" and "topk" in info.data and info.data["topk"] is None:
            raise _house("be 'factored' when topk is none, whose weights stand inside the power", schatten)
        return schatten


class Optimiser(_Model):
    """The learning rate and its schedule."""

    lr: _Positive = Field(description="learning rate after warm-up (> 0)")
    schedule: Literal["constant", "linear", "cosine", "exponential"] = Field(
        default="constant", description="after warm-up"
    )
    warmup: Annotated[_Float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="fraction of the steps spent rising to lr"
    )
    halflife: _Positive | None = Field(
        default=None, description="steps in which lr halves; only for the exponential schedule"
    )

    @pydantic.field_validator("halflife")
    @classmethod
    def _halflife_if_exponential(cls, halflife: float | None, info: ValidationInfo) -> float | None:
        schedule = info.data.get("schedule")
        if schedule == "exponential" and halflife is None:
            raise _house("be given when schedule is 'exponential'", None)
        if schedule not in ("exponential", None) and halflife is not None:
            raise _house(f"be left out when schedule is {schedule!r}", halflife)
        return halflife


class _Target(_Model):
    family: str = Field(default="", description="which kind of target this is")  # first, so that files name it first
    n_features: _Count = Field(description="number of input features")
    feature_probability: Annotated[_Float, Field(gt=0, le=1)] = Field(description="chance that a feature is active")
    steps: _Count = Field(description="training steps of the target")
    batch: _Count = Field(description="samples per training step of the target")
    lr: _Positive = Field(description="learning rate of the target's training (> 0)")


class TMSTarget(_Target):
    """The toy model of superposition that is decomposed, and its training."""

    family: Literal["tms"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="tms", description="which kind of target this is"
    )
    n_hidden: _Count = Field(description="number of hidden dimensions")


class ResidualMLPTarget(_Target):
    """The residual MLP that is decomposed, and its training."""

    family: Literal["residual_mlp"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="residual_mlp", description="which kind of target this is"
    )
    d_embed: _Count = Field(description="width of the residual stream")
    d_mlp: _Count = Field(description="neurons per layer")
    n_layers: _Count = Field(description="number of MLP layers")
    act: Literal["relu", "gelu"] = Field(default="relu", description="activation function")


class RunConfig(_Model):
    """Everything that determines a run: the target, the method and its training."""

    experiment: _Name = Field(description="name of the experiment, and of its run directory unless one is given")
    seed: Annotated[_Int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="seed of every random number in the run"
    )
    n_instances: _Count = Field(default=1, description="independent targets decomposed side by side")
    n_components: _Count = Field(description="components per instance (C)")
    rank: _Count | None = Field(default=None, description="largest rank of a component (m); none: full rank")
    steps: _Count = Field(description="optimisation steps")
    batch: _Count = Field(description="samples per step and instance")
    init_scale: _Positive = Field(default=1.0, description="scale of the initial components (> 0)")
    optimiser: Optimiser = Field(description="the learning rate and its schedule")
    method: APD = Field(description="how components are selected and what the loss is made of")
    target: TMSTarget | ResidualMLPTarget = Field(discriminator="family", description="the network to decompose")
    log_every: _Count = Field(default=100, description="steps between two rows of metrics")
    eval_batch: _Count = Field(default=4096, description="samples in an evaluation")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to run; auto: a GPU if there is one"
    )
    dtype: Literal["float32", "float64"] = Field(default="float32", description="floating-point type of the run")
    cuda_graph: bool = Field(
        default=False, strict=True, description="replay the steps as one CUDA graph (on a GPU, in float32)"
    )

    @pydantic.field_validator("method")
    @classmethod
    def _topk_fits(cls, method: APD, info: ValidationInfo) -> APD:
        n_components = info.data.get("n_components", math.inf)
        rankable = n_components - method.distil_from_target
        if method.topk is not None and method.topk > rankable:
            which = "n_components - 1" if method.distil_from_target else "n_components"
            raise _house(f"be <= {which} = {rankable}", method.topk, key="method.topk")
        return method

    @pydantic.field_validator("cuda_graph")
    @classmethod
    def _graph_fits(cls, cuda_graph: bool, info: ValidationInfo) -> bool:
        method = info.data.get("method")
        against = {
            "device is 'cpu'": info.data.get("device") == "cpu",
            "dtype is 'float64'": info.data.get("dtype") == "float64",
            "method.selection is 'exact'": method and method.topk is not None and method.selection == "exact",
        }
        for reason, holds in against.items():
            if cuda_graph and holds:
                raise _house(f"be false when {reason}", cuda_graph)
        return cuda_graph


# ---- errors in the house's words

_SECTIONS: dict[str, type[BaseModel]] = {"optimiser": Optimiser, "method": APD}
_TARGETS: dict[str, type[BaseModel]] = {"tms": TMSTarget, "residual_mlp": ResidualMLPTarget}
_LIMITS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
_PLAIN_TAGS = {"float_type": ("int", "float"), "int_type": ("int",), "bool_type": ("bool",)}  # see PLAIN
_NEEDS = {
    "finite_number": "be a finite number", "float_type": "be a number", "int_type": "be a whole number",
    "string_type": "be text", "bool_type": "be true or false", "invalid_key": "be text, as every key",
    "model_type": "be a mapping", "model_attributes_type": "be a mapping", "frozen_instance": "not be assigned to",
    "string_pattern_mismatch": "be 1 to 100 letters, digits or . _ -, starting with a letter or digit",
}  # fmt: skip


def _locate(title: str, loc: tuple[Any, ...]) -> tuple[list[Any], type[BaseModel]]:
    """Where an error of the model named `title` lies: the keys on the way to it, and the model that holds the last."""
    for name, cls in (_SECTIONS | _TARGETS).items():
        if title == cls.__name__:  # a section validated alone is still named by its place
            return ["target" if name in _TARGETS else name, *loc], cls
    if len(loc) > 1 and loc[0] == "target":  # pydantic has the union's member between the keys; a file does not
        return ["target", *loc[2:]], _TARGETS.get(loc[1], RunConfig)
    return list(loc), _SECTIONS.get(loc[0], RunConfig) if len(loc) > 1 else RunConfig


def _suggest(key: str, model: type[BaseModel]) -> str:
    close = difflib.get_close_matches(key[:100], model.model_fields, n=1)
    if not close:  # a known key at the wrong place
        close = [key] if key in RunConfig.model_fields else []
        close += [f"{name}.{key}" for name, section in _SECTIONS.items() if key in section.model_fields]
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(model.model_fields)}"


def _describe(title: str, error: Mapping[str, Any]) -> str:
    """One line for one pydantic error."""
    kind, got, context = error["type"], error["input"], error.get("ctx", {})
    keys, model = _locate(title, error["loc"])
    last, hint = (keys or [""])[-1], ""
    if kind == "missing":
        needs, got = "be given", None
    elif kind in ("union_tag_not_found", "union_tag_invalid"):
        keys.append("family")
        needs, got = f"be {' or '.join(map(repr, _TARGETS))}", got.get("family") if isinstance(got, Mapping) else None
    elif kind == "literal_error":
        needs = "be " + " or ".join(map(repr, get_args(model.model_fields[last].annotation)))
    elif kind in _LIMITS:
        needs = f"be {_LIMITS[kind]} {next(iter(context.values()))}"
    elif kind == "house":
        keys = [*keys[:-1], *context["key"].split(".")] if context["key"] else keys
        needs, got = context["condition"], context["got"]
    else:
        needs = _NEEDS.get(kind) or f"be valid ({error['msg']})"
        if isinstance(got, str) and any(PLAIN[tag].match(got) for tag in _PLAIN_TAGS.get(kind, ())):
            hint = "; write it without quotes"
    # a key that is no word is quoted: it may hold dots or line ends
    path = ".".join(key if isinstance(key, str) and key.isidentifier() else show(key) for key in keys)
    if kind == "extra_forbidden":
        return f"config: {path} is not a known key; {_suggest(last, model)}"
    return f"config: {path or 'the configuration'} must {needs}, got {show(got)}{hint}"


def format_errors(exc: pydantic.ValidationError) -> str:
    """The problems in `exc`, one line each, in the form `config: <dotted.key> must <condition>, got <value>`.

    Args:
        exc: what validating one of this module's models raised. Errors of a section validated alone
            (`APD.model_validate`) are named by the section's place in a file (`method.topk`).
    """
    return "\n".join(_describe(exc.title, error) for error in exc.errors(include_url=False))


# ---- files


def load(path: str | Path) -> RunConfig:
    """Read and validate a YAML file (see `loads` and `parse`).

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file cannot be read as a configuration; every problem is listed, with the file's name.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"config: {path} must be a file, got {'a directory' if path.is_dir() else 'nothing'}")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)  # never more, whatever the file is
    try:
        text = data.decode("utf-8-sig", "strict" if len(data) <= MAX_BYTES else "replace")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"config: {path} must be UTF-8, got {exc.reason} at byte {exc.start}") from None
    return parse(loads(text, source=str(path)), source=str(path))


def parse(mapping_or_config: Mapping[str, Any] | RunConfig, source: str = "<mapping>") -> RunConfig:
    """Validate a mapping, or validate a configuration again (`model_copy(update=...)` does not).

    Args:
        mapping_or_config: keys as in a file; sections are mappings or this module's models.
        source: a file's name, for the last line of the message; names that start with `<` are left out.

    Raises:
        ConfigError: every problem, one line each (see `format_errors`).
    """
    try:
        return RunConfig.model_validate(mapping_or_config)
    except pydantic.ValidationError as exc:
        origin = "" if source.startswith("<") else f"\nconfig: read from {source}"
        raise ConfigError(f"{format_errors(exc)}{origin}") from None


def dump(config: RunConfig) -> str:
    """The configuration as YAML that `load` reads back to an equal one; every key is written."""
    return yaml.dump(config.model_dump(), Dumper=StrictDumper, sort_keys=False)
