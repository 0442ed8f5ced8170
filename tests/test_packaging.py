"""What an sdist and a wheel hold, and what an installation does where a compiler is missing."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NO_COMPILER = "no-such-compiler"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="these tests need the checkout")


def run(*command: str, cwd: Path, check: bool = True, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with none of the caller's build settings but those given."""
    ours = ("CXX", "CXXFLAGS", "LDFLAGS", "PYTHONPATH", "PYTHONSAFEPATH")
    env = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("FASTAPD_")} | settings
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done


def build(kind: str, tree: Path, **settings: str) -> Path:
    """Builds an sdist or a wheel of a source tree with the tools of this environment."""
    options = ("--no-isolation", "--skip-dependency-check", "--outdir", str(tree / "dist"))
    run(sys.executable, "-P", "-m", "build", f"--{kind}", *options, cwd=tree, FASTAPD_CUDA="0", **settings)
    (built,) = (tree / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources as git would see them, so that building leaves the checkout alone."""
    for module in ("build", "ninja", "pybind11", "setuptools", "wheel"):
        pytest.importorskip(module)
    target = tmp_path_factory.mktemp("tree") / "fastapd"
    listing = ["git", "ls-files", "-coz", "--exclude-standard"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        for name in run(*listing, cwd=ROOT).stdout.split("\0"):
            if name and (ROOT / name).is_file():  # a file that was deleted but not committed is still listed
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name)
    else:
        made = (".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build_info.json")
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*made))
    return target


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    return build("sdist", tree)


@pytest.fixture(scope="module")
def unpacked_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="module")
def wheel(unpacked_sdist: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", unpacked_sdist))


def build_info(wheel: zipfile.ZipFile) -> dict:
    return json.loads(wheel.read("fastapd/_build_info.json"))


def test_sdist_holds_every_native_source_even_with_cuda_off(tree: Path, unpacked_sdist: Path) -> None:
    def sources(root: Path) -> set[str]:
        files = [path for folder in ("csrc", "kernels") for path in (root / folder).rglob("*") if path.is_file()]
        return {path.relative_to(root).as_posix() for path in files}

    assert sources(unpacked_sdist) == sources(tree)
    assert any(name.endswith(".cu") for name in sources(unpacked_sdist))
    assert (unpacked_sdist / "LICENSE").exists()
    assert (unpacked_sdist / "constraints.txt").exists()


def test_wheel_holds_fastapd_alone(tree: Path, wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    top = {name.split("/")[0] for name in names}
    assert "fastapd" in top
    assert [name.split("-")[0] for name in top if name.endswith(".dist-info")] == ["fastapd"]
    assert len(top) == 2
    assert not [name for name in names if {"tests", "bench", "csrc"} & set(name.split("/"))]
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h"))]


def test_wheel_holds_every_module_and_data_file(tree: Path, wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    expected = {"fastapd/py.typed", "fastapd/_build_info.json"}
    expected |= {path.relative_to(tree).as_posix() for path in (tree / "fastapd").rglob("*.py")}
    expected |= {path.relative_to(tree).as_posix() for path in (tree / "fastapd").rglob("*.html.j2")}
    expected |= {f"fastapd/{path.relative_to(tree).as_posix()}" for path in (tree / "kernels").rglob("*.py")}
    assert expected - names == set()


def test_wheel_holds_the_native_module_and_says_what_it_left_out(wheel: zipfile.ZipFile) -> None:
    info = build_info(wheel)
    assert info["_C_cuda"] == "FASTAPD_CUDA=0"
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip(f"no _C here: {info['_C']}")
    assert info["_C"] is None
    assert len([name for name in wheel.namelist() if name.startswith("fastapd/_C.")]) == 1
    assert info["cpu_levels"][0] == "baseline"
    assert info["compiler"]


def test_wheel_requires_lower_bounds_only(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(metadata).decode().split("\n\n")[0].splitlines()
    requirements = [Requirement(line.split(":", 1)[1]) for line in lines if line.startswith("Requires-Dist:")]
    assert "torch" in {requirement.name for requirement in requirements}
    assert {s.operator for requirement in requirements for s in requirement.specifier} == {">="}


def test_native_modules_link_neither_torch_nor_cudart(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    if shutil.which("ldd") is None:
        pytest.skip("ldd is not on this machine")
    wheel.extractall(tmp_path)
    modules = list(tmp_path.glob("fastapd/_C*.so"))
    # The wheel is built without CUDA, for speed; the CUDA module at hand is the installed one.
    spec = importlib.util.find_spec("fastapd")
    folders = (spec and spec.submodule_search_locations) or []
    modules += [path for folder in folders for path in Path(folder).glob("_C*.so")]
    if not modules:
        pytest.skip("no native module was built here")
    for module in modules:
        needed = run("ldd", str(module), cwd=tmp_path).stdout
        assert "libc" in needed, f"ldd says nothing about {module}"
        for library in ("torch", "libc10", "libcudart", "libcuda.so"):
            assert library not in needed, f"{module.name} links {library}:\n{needed}"


def test_without_a_compiler_the_wheel_is_pure_python(tree: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("dist", "build"))
    wheel = zipfile.ZipFile(build("wheel", copy, CXX=NO_COMPILER))
    assert not [name for name in wheel.namelist() if name.startswith("fastapd/_C")]
    assert build_info(wheel)["_C"] == f"no C++ compiler: {NO_COMPILER} not found"


def test_without_a_compiler_building_in_place_removes_the_stale_module(tree: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("dist", "build"))
    stale = [copy / "fastapd" / f"{name}.cpython-311-x86_64-linux-gnu.so" for name in ("_C", "_C_cuda")]
    for path in stale:
        path.write_bytes(b"")
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=copy, CXX=NO_COMPILER)
    assert f"fastapd._C is not built: no C++ compiler: {NO_COMPILER} not found" in done.stdout
    assert not [path for path in stale if path.exists()]
    info = json.loads((copy / "fastapd/_build_info.json").read_text())
    assert NO_COMPILER in info["_C"]
    assert NO_COMPILER in info["_C_cuda"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FASTAPD_CUDA": "yes"}, "FASTAPD_CUDA must be auto, 0 or 1, got 'yes'"),
        ({"FASTAPD_CPU": "2"}, "FASTAPD_CPU must be auto, 0 or 1, got '2'"),
        ({"FASTAPD_CUDA_ARCHS": "80;hopper"}, "FASTAPD_CUDA_ARCHS must be like \"80;90\", got 'hopper'"),
        ({"FASTAPD_CPU": "1"}, f"FASTAPD_CPU=1 must find working compilers, got: no C++ compiler: {NO_COMPILER}"),
        ({"FASTAPD_CPU": "0", "FASTAPD_CUDA": "1"}, "FASTAPD_CUDA=1 must find working compilers, got: no C++ compiler"),
    ],
    ids=["unknown-cuda", "unknown-cpu", "unknown-arch", "cpu-without-compiler", "cuda-without-compiler"],
)
def test_a_setting_that_cannot_be_met_is_an_error(tree: Path, settings: dict[str, str], message: str) -> None:
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    done = run(*command, cwd=tree, check=False, CXX=NO_COMPILER, **settings)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tree / "fastapd/_build_info.json").exists()


def test_kernels_is_not_importable_under_its_own_name() -> None:
    done = run(sys.executable, "-c", "import kernels", cwd=ROOT, check=False)
    assert done.returncode != 0
    assert "ImportError: kernels: the module must be imported as fastapd.kernels, got kernels" in done.stderr
