"""Configurations: what is read, what is refused and with which words, and that writing loses nothing."""

from __future__ import annotations

import math
import re
import types
from typing import Any

import numpy as np
import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastapd import config
from fastapd.config import APD, ConfigError, Optimiser, ResidualMLPTarget, RunConfig, TMSTarget

TMS = {
    "family": "tms",
    "n_features": 5,
    "n_hidden": 2,
    "feature_probability": 0.05,
    "steps": 10,
    "batch": 8,
    "lr": 5e-3,
}
RESIDUAL = {
    "family": "residual_mlp", "n_features": 100, "d_embed": 1000, "d_mlp": 50, "n_layers": 1,
    "feature_probability": 0.01, "steps": 10, "batch": 8, "lr": 3e-3,
}  # fmt: skip


def _mapping(**changes: Any) -> dict[str, Any]:
    return {
        "experiment": "tms_5-2", "n_components": 5, "steps": 100, "batch": 32, "optimiser": {"lr": 0.03},
        "method": {"topk": 0.211}, "target": TMS,
    } | changes  # fmt: skip


def _problems(**changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(_mapping(**changes))
    return str(caught.value).split("\n")


# ---- models


def test_config_defaults_are_filled_in():
    run = config.parse(_mapping())
    assert run.method == APD(topk=0.211)
    assert (run.method.selection, run.method.eps, run.rank, run.dtype) == ("batch", 1e-16, None, "float32")
    assert isinstance(run.target, TMSTarget)
    assert isinstance(config.parse(_mapping(target=RESIDUAL)).target, ResidualMLPTarget)


def test_config_every_field_is_described():
    for model in (RunConfig, APD, Optimiser, TMSTarget, ResidualMLPTarget):
        for name, field in model.model_fields.items():
            assert field.description and "\n" not in field.description, name


def test_config_is_frozen_and_hashable():
    run = config.parse(_mapping())
    with pytest.raises(pydantic.ValidationError) as caught:
        run.steps = 3
    assert config.format_errors(caught.value) == "config: steps must not be assigned to, got 3"
    assert hash(run) == hash(config.parse(_mapping()))


@pytest.mark.parametrize("value", [20_000, 2e4, np.int64(20_000), np.float64(2e4)])
def test_config_whole_numbers_of_any_kind_are_integers(value):
    steps = config.parse(_mapping(steps=value)).steps
    assert type(steps) is int and steps == 20_000


@pytest.mark.parametrize("value", [1, np.int32(1), np.float32(1)])
def test_config_numbers_of_any_kind_are_floats(value):
    lr = config.parse(_mapping(optimiser={"lr": value})).optimiser.lr
    assert type(lr) is float and lr == 1.0


NAME_RULE = "be 1 to 100 letters, digits or . _ -, starting with a letter or digit"
REFUSALS = [
    ({"seed": -1}, "seed must be >= 0, got -1"),
    ({"seed": 2**63}, f"seed must be < {2**63}, got {2**63}"),
    ({"seed": 10**5000}, f"seed must be < {2**63}, got an integer of 16610 bits"),
    ({"seed": True}, "seed must be a whole number, got True"),
    ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ({"seed": math.nan}, "seed must be a whole number, got nan"),
    ({"steps": "20000"}, "steps must be a whole number, got '20000'; write it without quotes"),
    ({"steps": 0}, "steps must be >= 1, got 0"),
    ({"steps": None}, "steps must be a whole number, got nothing"),
    ({"steps": [1]}, "steps must be a whole number, got list(...)"),
    ({"batch": 2**31}, f"batch must be < {2**31}, got {2**31}"),
    ({"batch": "x" * 1000}, f"batch must be a whole number, got '{'x' * 76}..."),
    ({"rank": 0}, "rank must be >= 1, got 0"),
    ({"init_scale": 0}, "init_scale must be > 0, got 0"),
    ({"init_scale": 10**400}, "init_scale must be a finite number, got an integer of 1329 bits"),
    ({"device": "gpu"}, "device must be 'auto' or 'cpu' or 'cuda', got 'gpu'"),
    ({"experiment": 3}, "experiment must be text, got 3"),
    ({"experiment": "../x"}, f"experiment must {NAME_RULE}, got '../x'"),
    ({"experiment": "a\n"}, f"experiment must {NAME_RULE}, got 'a\\n'"),
    ({"experiment": ""}, f"experiment must {NAME_RULE}, got ''"),
    ({"experiment": "x" * 101}, f"experiment must {NAME_RULE}, got '{'x' * 76}..."),
    ({"optimiser": 3}, "optimiser must be a mapping, got 3"),
    ({"optimiser": APD(topk=1)}, "optimiser must be a mapping, got APD(...)"),
    ({"optimiser": {"lr": "1e-3"}}, "optimiser.lr must be a number, got '1e-3'; write it without quotes"),
    ({"optimiser": {"lr": "fast"}}, "optimiser.lr must be a number, got 'fast'"),
    ({"optimiser": {"lr": True}}, "optimiser.lr must be a number, got True"),
    ({"optimiser": {"lr": 0.0}}, "optimiser.lr must be > 0, got 0.0"),
    ({"optimiser": {"lr": math.inf}}, "optimiser.lr must be a finite number, got inf"),
    ({"optimiser": {"lr": 1, "warmup": 1}}, "optimiser.warmup must be < 1, got 1"),
    ({"optimiser": {"lr": 1, "warmup": -0.1}}, "optimiser.warmup must be >= 0, got -0.1"),
    (
        {"optimiser": {"lr": 1, "schedule": "exponential"}},
        "optimiser.halflife must be given when schedule is 'exponential', got nothing",
    ),
    (
        {"optimiser": {"lr": 1, "halflife": 3}},
        "optimiser.halflife must be left out when schedule is 'constant', got 3.0",
    ),
    ({"method": {"topk": 5.5}}, "method.topk must be <= n_components = 5, got 5.5"),
    (
        {"method": {"topk": 0.5, "selection": "sample"}},
        "method.topk must be a whole number when selection is 'sample', got 0.5",
    ),
    ({"method": {"topk": -1}}, "method.topk must be >= 0, got -1"),
    (
        {"method": {"topk": 1.0, "attribution_refined": 2}},
        "method.attribution_refined must be left out when attribution_probes is none: they are exact, got 2",
    ),
    (
        {"method": {"topk": None, "attribution_probes": 4, "attribution_refined": 2}},
        "method.attribution_refined must be left out when topk is none, whose attributions are differentiated, got 2",
    ),
    (
        {"method": {"topk": 1.0, "attribution_probes": 4, "attribution_refined": 2, "lp_sparsity": 0.5}},
        "method.lp_sparsity must be 0 when attribution_refined is given, whose values have no gradient, got 0.5",
    ),
    ({"method": {"topk": math.nan}}, "method.topk must be a finite number, got nan"),
    ({"method": {"topk": 1, "p": 0}}, "method.p must be > 0, got 0"),
    ({"method": {"topk": 1, "eps": 0}}, "method.eps must be > 0, got 0"),
    ({"method": {"topk": 1, "simplicity": -1}}, "method.simplicity must be >= 0, got -1"),
    ({"method": {"topk": 1, "unit_norm": "no"}}, "method.unit_norm must be true or false, got 'no'"),
    ({"method": {"topk": 1, "unit_norm": 1}}, "method.unit_norm must be true or false, got 1"),
    ({"method": {"topk": 1, "unit_norm": "true"}}, "method.unit_norm must be true or false, got 'true'; write it"),
    ({"method": {"topk": 1, "selection": "all"}}, "method.selection must be 'batch' or 'sample' or 'exact', got 'all'"),
    ({"cuda_graph": 1}, "cuda_graph must be true or false, got 1"),
    ({"cuda_graph": True, "device": "cpu"}, "cuda_graph must be false when device is 'cpu', got True"),
    ({"cuda_graph": True, "dtype": "float64"}, "cuda_graph must be false when dtype is 'float64', got True"),
    (
        {"cuda_graph": True, "method": {"topk": 1, "selection": "exact"}},
        "cuda_graph must be false when method.selection is 'exact', got True",
    ),
    ({"target": {}}, "target.family must be 'tms' or 'residual_mlp', got nothing"),
    ({"target": {"family": "gpt"}}, "target.family must be 'tms' or 'residual_mlp', got 'gpt'"),
    ({"target": 3}, "target must be a mapping, got 3"),
    ({"target": TMS | {"n_hidden": 0}}, "target.n_hidden must be >= 1, got 0"),
    ({"target": TMS | {"feature_probability": 1.1}}, "target.feature_probability must be <= 1, got 1.1"),
    ({"target": RESIDUAL | {"act": "tanh"}}, "target.act must be 'relu' or 'gelu', got 'tanh'"),
    ({"optimiser": {"lr": 1, "lrr": 2}}, "optimiser.lrr is not a known key; did you mean 'lr'?"),
    ({"optimizer": {}}, "optimizer is not a known key; did you mean 'optimiser'?"),
    ({"lr": 1}, "lr is not a known key; did you mean 'optimiser.lr'?"),
    ({"method": {"topk": 1, "seed": 1}}, "method.seed is not a known key; did you mean 'seed'?"),
    ({"target": TMS | {"tms": 1}}, "target.tms is not a known key; known here: family, n_features,"),
    ({"a\nb.c": 1}, "'a\\nb.c' is not a known key; known here: experiment, seed,"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS, ids=[message[:40] for _, message in REFUSALS])
def test_config_refusal_names_the_key(changes, message):
    (problem,) = _problems(**changes)
    assert problem.startswith(f"config: {message}")


def test_config_takes_a_graph_where_there_can_be_one():
    assert config.parse(_mapping()).cuda_graph is False
    assert config.parse(_mapping(cuda_graph=True, device="cuda")).cuda_graph is True
    lp = {"topk": None, "selection": "exact", "lp_sparsity": 1.0}  # where nothing is selected
    assert config.parse(_mapping(cuda_graph=True, method=lp)).cuda_graph is True


def test_config_lists_every_problem():
    problems = _problems(steps=0, optimiser={"lrr": 1}, method={"topk": 9, "p": 1}, target={"family": "tms"})
    assert problems == [
        "config: steps must be >= 1, got 0",
        "config: optimiser.lr must be given, got nothing",
        "config: optimiser.lrr is not a known key; did you mean 'lr'?",
        "config: method.topk must be <= n_components = 5, got 9.0",
        *(f"config: target.{key} must be given, got nothing" for key in TMSTarget.model_fields if key != "family"),
    ]


def test_config_parse_refuses_what_is_no_mapping():
    for value, shown in ((3, "3"), (None, "nothing"), ([1], "list(...)")):
        with pytest.raises(
            ConfigError, match=rf"^config: the configuration must be a mapping, got {re.escape(shown)}$"
        ):
            config.parse(value)
    with pytest.raises(ConfigError, match=r"^config: 1 must be text, as every key, got 1$"):
        config.parse(_mapping() | {1: 2})


def test_config_parse_checks_a_configuration_again():
    run = config.parse(_mapping())
    assert config.parse(run) == run
    assert config.parse(types.MappingProxyType(_mapping(method=run.method))) == run
    with pytest.raises(ConfigError, match=r"^config: steps must be >= 1, got 0\nconfig: read from run\.yaml$"):
        config.parse(run.model_copy(update={"steps": 0}), source="run.yaml")
    with pytest.raises(ConfigError, match=r"method\.topk must be >= 0, got -3\.0"):
        config.parse(run.model_copy(update={"method": APD.model_construct(topk=-3.0)}))


def test_config_models_raise_config_errors_named_by_their_place():
    with pytest.raises(ConfigError, match=r"^config: method\.topk must be >= 0, got -1$"):
        APD(topk=-1)
    with pytest.raises(ConfigError, match=r"^config: target\.act must be 'relu' or 'gelu', got 3$"):
        ResidualMLPTarget(**RESIDUAL | {"act": 3})
    with pytest.raises(ConfigError, match=r"^config: steps must be >= 1, got 0$"):
        RunConfig(**_mapping(steps=0))


# ---- YAML

SCALARS = [
    ("1e-3", 1e-3), ("7e-1", 0.7), ("1e1", 10.0), ("3E-2", 0.03), ("5.", 5.0), (".5", 0.5), ("+1.5e+3", 1500.0),
    ("-1_000.5", -1000.5), ("20_000", 20_000), ("-3", -3), ("010", 10), ("0", 0), ("1e400", math.inf),
    (".inf", math.inf), ("-.INF", -math.inf), ("true", True), ("True", True), ("FALSE", False),
    ("no", "no"), ("yes", "yes"), ("on", "on"),
    ("off", "off"), ("y", "y"), ("tRUE", "tRUE"), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"), ("0x10", "0x10"),
    ("1__0", "1__0"), ("_1", "_1"), ("1_", "1_"), (".", "."), ("=", "="), ("null", None), ("~", None), ("", None),
    ("'1e-3'", "1e-3"), ('"true"', "true"), ("[1, 2]", [1, 2]), ("{b: 1}", {"b": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_config_yaml_scalar(text, value):
    got = config.loads(f"a: {text}\n")["a"]
    assert got == value and type(got) is type(value)


def test_config_yaml_nan():
    assert math.isnan(config.loads("a: .nan")["a"])


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
LIMITS = "stay within 32 levels and 10000 keys and values, got one more"
YAML_REFUSALS = [
    ("a: 1\nb:\n  c: 1\n  c: 2", "line 4 must not repeat the key of line 3, got 'c'"),
    ("a: 1\n'a': 2", "line 2 must not repeat the key of line 1, got 'a'"),
    (BOMB, "line 1 must not use anchors and aliases, got &a0"),
    ("a: *x", "line 1 must not use anchors and aliases, got *x"),
    ("a: 1\n<<: {b: 1}", "line 2 must not use merge keys, got '<<'"),
    ("a: !!int 3", "line 1 must not use tags, got 'tag:yaml.org,2002:int'"),
    ("a: ! 3", "line 1 must not use tags, got '!'"),
    ("!!python/object/apply:os.getcwd []", "line 1 must not use tags, got 'tag:yaml.org,2002:python/object/apply"),
    ("1: 2", "line 1 must have text as its key, got '1'"),
    ("true: 2", "line 1 must have text as its key, got 'true'"),
    ("~: 2", "line 1 must have text as its key, got '~'"),
    ("? [1]\n: 2", "line 1 must have text as its key, got a sequence"),
    ("- 1", "must hold a mapping, got list(...)"),
    ("just text", "must hold a mapping, got 'just text'"),
    ("", "must hold a mapping, got nothing"),
    ("a: 1\n---\nb: 2", "line 2 must be YAML, got: expected a single document in the stream, but found another"),
    ("a: [", "line 1 must be YAML, got: while parsing a flow node, expected the node content, but found"),
    ("a: b: c", "line 1 must be YAML, got: mapping values are not allowed here"),
    ("a: \x00", "must be YAML, got: special characters are not allowed"),
    ("a: \ud800", "must be YAML, got: special characters are not allowed"),
    ("a: " + "[" * 100_000, f"line 1 must {LIMITS}"),
    ("a: " + "{a: " * 10_000, f"line 1 must {LIMITS}"),
    ("\n".join(" " * i + "a:" for i in range(1000)), f"line 32 must {LIMITS}"),
    ("a: [" + "1," * 20_000 + "]", f"line 1 must {LIMITS}"),
    ("a: " + "9" * 5000, "line 1 must hold a number of at most 400 digits, got one of 5000"),
    ("#" * (2**20 + 1), "must have at most 1048576 bytes, got more"),
    ("é" * (2**19 + 1), "must have at most 1048576 bytes, got more"),
]


@pytest.mark.parametrize(("text", "message"), YAML_REFUSALS, ids=[message[:60] for _, message in YAML_REFUSALS])
def test_config_yaml_refusal_names_the_line(text, message):
    with pytest.raises(ConfigError) as caught:
        config.loads(text, source="run.yaml")
    assert str(caught.value).startswith(f"config: run.yaml {message}")
    assert "\n" not in str(caught.value)


@given(st.text() | st.text("[]{}:,-?&*!|>'\"%@#~<=. \n\ta1e_"))
def test_config_yaml_any_text_is_read_or_refused(text):
    try:
        assert isinstance(config.loads(text), dict)
    except ConfigError as exc:
        assert str(exc).startswith("config: <string> ")


def test_config_load_reads_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + config.dump(config.parse(_mapping())).encode())  # a byte order mark is no key
    assert config.load(path) == config.load(str(path)) == config.parse(_mapping())


def test_config_load_refusals_name_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    with pytest.raises(FileNotFoundError, match=r"^config: .*run\.yaml must be a file, got nothing$"):
        config.load(path)
    with pytest.raises(FileNotFoundError, match=r"must be a file, got a directory$"):
        config.load(tmp_path)
    path.write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"^config: .*run\.yaml must be UTF-8, got invalid start byte at byte 3$"):
        config.load(path)
    path.write_bytes("é".encode() * (2**19 + 1))
    with pytest.raises(ConfigError, match=r"run\.yaml must have at most 1048576 bytes, got more$"):
        config.load(path)
    path.write_text("optimiser:\n  lr: .inf\nmethod: {topk: 1, unit_norm: off}\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    lines = str(caught.value).split("\n")
    assert "config: optimiser.lr must be a finite number, got inf" in lines
    assert "config: method.unit_norm must be true or false, got 'off'" in lines
    assert lines[-1] == f"config: read from {path}"


# ---- round trip

positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
coefficient = st.floats(min_value=0, allow_infinity=False)
count = st.integers(1, 2**31 - 1)
probability = st.floats(0, 1, exclude_min=True)
optimisers = st.one_of(
    st.builds(Optimiser, lr=positive, schedule=st.just("exponential"), halflife=positive),
    st.builds(
        Optimiser,
        lr=positive,
        schedule=st.sampled_from(["constant", "linear", "cosine"]),
        warmup=st.floats(0, 1, exclude_max=True),
    ),
)
methods = st.builds(
    APD, topk=st.floats(0, 1), attribution=st.sampled_from(["gradient", "activation"]), faithfulness=coefficient,
    minimality=coefficient, simplicity=coefficient, p=positive, output_reconstruction=coefficient,
    activation_reconstruction=coefficient, unit_norm=st.booleans(), eps=positive,
)  # fmt: skip
shared = {"n_features": count, "feature_probability": probability, "steps": count, "batch": count, "lr": positive}
targets = st.one_of(
    st.builds(TMSTarget, n_hidden=count, **shared),
    st.builds(
        ResidualMLPTarget, d_embed=count, d_mlp=count, n_layers=count, act=st.sampled_from(["relu", "gelu"]), **shared
    ),
)
runs = st.builds(
    lambda graph, **values: RunConfig(
        **values | ({"cuda_graph": True, "device": "cuda", "dtype": "float32"} if graph else {})
    ),
    graph=st.booleans(),
    experiment=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z", fullmatch=True)
    | st.sampled_from(["1e3", "no", "true", "null", "010", "1_0", "2020-01-01", "0x1F", "1.", "y"]),
    seed=st.integers(0, 2**63 - 1), n_instances=count, n_components=count, rank=st.none() | count, steps=count,
    batch=count, init_scale=positive, optimiser=optimisers, method=methods, target=targets, log_every=count,
    eval_batch=count, device=st.sampled_from(["auto", "cpu", "cuda"]), dtype=st.sampled_from(["float32", "float64"]),
)  # fmt: skip


@given(runs)
def test_config_dump_round_trip(run):
    text = config.dump(run)
    assert config.parse(config.loads(text)) == run
    assert yaml.safe_load(text) == run.model_dump()  # and any other reader agrees


def test_config_dump_keeps_small_floats():
    run = config.parse(_mapping(method={"topk": 1, "eps": 1e-16}, optimiser={"lr": 5e-324}))
    assert config.parse(config.loads(config.dump(run))) == run


# ---- command line


def test_config_builds_a_command_line(capsys):
    import tyro

    default = config.parse(_mapping())
    run = tyro.cli(RunConfig, default=default, args=["--optimiser.lr", "1e-3", "--method.topk", "0.3"])
    assert run == config.parse(_mapping(optimiser={"lr": 1e-3}, method={"topk": 0.3}))
    with pytest.raises(SystemExit):
        tyro.cli(RunConfig, default=default, args=["--help"])
    assert "learning rate after warm-up" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tyro.cli(RunConfig, default=default, args=["--rank", "0"])
    assert "config: rank must be >= 1, got 0" in capsys.readouterr().err
