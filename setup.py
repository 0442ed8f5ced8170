"""Builds the native modules with one ninja graph; metadata and tool settings are in pyproject.toml.

fastapd._C is C++ and fastapd._C_cuda is CUDA. Both take addresses, so torch is not needed here. What cannot be built is
left out with its reason, printed and kept in fastapd/_build_info.json. The environment decides:

FASTAPD_CPU, FASTAPD_CUDA   auto (the default: build where the compiler exists), 0 (do not), 1 (must)
FASTAPD_CUDA_ARCHS          compute capabilities, such as "80;90"; the newest is added as PTX too
CXX, CXXFLAGS, LDFLAGS      as everywhere; CUDA_HOME is where nvcc is looked for before PATH

and for tests of fastapd._C:

FASTAPD_SANITIZE            address, undefined, thread, or several joined by commas: builds with these sanitizers
FASTAPD_THREADS             auto (OpenMP where the compiler has it), openmp (must), none (one thread), std (std::thread,
                            which the thread sanitizer understands; the baseline level alone)
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer, escape
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
INCLUDES = ["-Icsrc", "-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
LEVELS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma"]
    LEVELS["avx512"] = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    LEVELS["avx512"] += ["-mavx2", "-mfma", "-mprefer-vector-width=512"]
DEFAULT_ARCHS = "80;90;100"
PROBE = '#include <pybind11/pybind11.h>\n\nPYBIND11_MODULE(probe, m) { m.doc() = "probe"; }\n'
OPENMP_PROBE = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
SANITIZERS = ("address", "undefined", "thread")


def switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise OptionError(f"build: {name} must be auto, 0 or 1, got {value!r}; unset it to build what the machine can")
    return value


def sanitizer_flags() -> list[str]:
    """What FASTAPD_SANITIZE adds to compiling; the first flag is for linking too."""
    wanted = os.environ.get("FASTAPD_SANITIZE", "")
    if not wanted:
        return []
    if bad := [name for name in wanted.split(",") if name not in SANITIZERS]:
        names = ", ".join(SANITIZERS)
        raise OptionError(f"build: FASTAPD_SANITIZE must be from {names}, joined by commas, got {bad[0]!r}")
    return [f"-fsanitize={wanted}", "-fno-omit-frame-pointer", "-O1", "-g"]


def threads_setting() -> str:
    value = os.environ.get("FASTAPD_THREADS", "auto")
    if value not in ("auto", "openmp", "std", "none"):
        raise OptionError(f"build: FASTAPD_THREADS must be auto, openmp, std or none, got {value!r}")
    return value


def output_of(*command: str) -> str:
    """What a command prints, or nothing when it fails: the caller decides what a silent tool means."""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout if run.returncode == 0 else ""


def flags_of(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def error_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    return next((line for line in lines if "error" in line), lines[-1])


def why_not(compiler: list[str], source: str, *flags: str) -> str | None:
    """The reason why a source cannot be compiled and linked to a module, or None when it can."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        command = [*compiler, "-std=c++17", "-fPIC", *INCLUDES, *flags, str(path), "-o", f"{folder}/probe", *LINK_FLAGS]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return error_line(run.stderr).replace(str(path), "probe.cpp") if run.returncode else None


def find_compiler() -> tuple[list[str], str | None]:
    """The C++ compiler's command, and the reason when there is none that works."""
    candidates = [flags_of("CXX")] if os.environ.get("CXX") else [["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            reason = why_not(command, PROBE, *flags_of("CXXFLAGS"), *flags_of("LDFLAGS"))
            return command, reason and f"{shlex.join(command)} cannot build a pybind11 module: {reason}"
    return [], "no C++ compiler: " + " or ".join(command[0] for command in candidates) + " not found"


def find_nvcc() -> tuple[str, str, list[str], str | None]:
    """nvcc's path, its version and the capabilities to build for, and the reason when it cannot be used."""
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")
    wanted = re.split(r"[;,\s]+", (os.environ.get("FASTAPD_CUDA_ARCHS") or DEFAULT_ARCHS).strip("; "))
    if bad := [arch for arch in wanted if not re.fullmatch(r"\d{2,3}[af]?", arch)]:
        raise OptionError(f'build: FASTAPD_CUDA_ARCHS must be like "80;90", got {bad[0]!r}')
    if nvcc is None:
        return "", "", [], "nvcc not found on PATH or in CUDA_HOME"
    version = re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))
    known = re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch"))
    if version is None or not known:
        return nvcc, "", [], f"{nvcc} does not run"
    unknown = [arch for arch in wanted if arch.rstrip("af") not in known]
    if unknown and os.environ.get("FASTAPD_CUDA_ARCHS"):
        known_archs = ", ".join(known)
        raise OptionError(f"build: FASTAPD_CUDA_ARCHS must be among {known_archs} for this nvcc, got {unknown[0]!r}")
    archs = [arch for arch in wanted if arch not in unknown]  # an older nvcc takes of the default what it knows
    return nvcc, version[1], archs, None if archs else f"nvcc {version[1]} knows none of {DEFAULT_ARCHS}"


class NinjaBuildExt(build_ext):
    """Replaces setuptools' compiler driving, which knows neither .cu files nor incremental builds."""

    def run(self) -> None:
        wants = {"_C": switch("FASTAPD_CPU"), "_C_cuda": switch("FASTAPD_CUDA")}
        sanitize, threads = sanitizer_flags(), threads_setting()
        self.cxx, no_cxx = find_compiler()
        self.nvcc, cuda_version, self.archs, no_nvcc = find_nvcc()
        no_cuda = "FASTAPD_SANITIZE is for fastapd._C" if sanitize else no_nvcc
        reasons = {"_C": no_cxx, "_C_cuda": no_cxx or no_cuda}
        for name, variable in (("_C", "FASTAPD_CPU"), ("_C_cuda", "FASTAPD_CUDA")):
            if wants[name] == "0":
                reasons[name] = f"{variable}=0"
            elif wants[name] == "1" and reasons[name]:
                advice = f"install one, or unset {variable} to go on without"
                raise CompileError(f"build: {variable}=1 must find working compilers, got: {reasons[name]}; {advice}")
        flags = [*CXX_FLAGS, *sanitize, *flags_of("CXXFLAGS")]
        if reasons["_C"] is None and sanitize and (reason := why_not(self.cxx, "int nothing;\n", *sanitize)):
            raise CompileError(f"build: {sanitize[0]} must work with {shlex.join(self.cxx)}, got: {reason}")
        no_openmp = why_not([*self.cxx, *flags], OPENMP_PROBE, "-fopenmp") if self.cxx else no_cxx
        if reasons["_C"] is None and threads == "openmp" and no_openmp:
            raise CompileError(f"build: FASTAPD_THREADS=openmp must find OpenMP, got: {no_openmp}")
        self.openmp = ["-fopenmp"] if threads in ("auto", "openmp") and not no_openmp else []
        # std::thread is a library template, which a level above the baseline must not instantiate (see simd.h).
        self.levels = {"baseline": LEVELS["baseline"]} if threads == "std" else LEVELS
        self.link_flags = [*LINK_FLAGS, *self.openmp, *sanitize[:1], *(["-pthread"] if threads == "std" else [])]
        defines = [f"-DFASTAPD_X86_LEVELS={int('avx512' in self.levels)}"]
        defines += ["-DFASTAPD_STD_THREADS=1", "-pthread"] if threads == "std" else []
        self.flags = [*flags, *self.openmp, *INCLUDES, *defines]

        modules = {name: Path(self.get_ext_fullpath(f"fastapd.{name}")) for name in reasons}
        targets = {name: path for name, path in modules.items() if reasons[name] is None}
        if targets:
            # In place setuptools would offer a fresh temporary folder each time, and with it no incremental build.
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            folder = Path("build", f"ninja-{tag}") if self.inplace else Path(self.build_temp)
            graph = self.write_graph(folder, targets)
            for name, path in targets.items():
                reasons[name] = self.run_ninja(graph, path)
                if reasons[name] and (name == "_C" or wants[name] == "1"):
                    advice = f"fix it, or set FASTAPD_{'CPU' if name == '_C' else 'CUDA'}=0 to install without"
                    raise CompileError(f"build: fastapd.{name} must compile, got: {reasons[name]}; {advice}")
        for name, reason in reasons.items():
            if reason:
                print(f"fastapd.{name} is not built: {reason}", flush=True)
                for stale in modules[name].parent.glob(f"{name}.*"):
                    stale.unlink()  # a module of an earlier build would be imported although it was switched off
        self.extensions = [e for e in self.extensions if reasons[e.name.rpartition(".")[2]] is None]

        info = {
            **reasons,
            "compiler": next(iter(output_of(*self.cxx, "--version").splitlines()), None) if self.cxx else None,
            "cuda": cuda_version or None,
            "cpu_levels": [] if reasons["_C"] else list(self.levels),
            "cuda_archs": [] if reasons["_C_cuda"] else self.archs,
            "openmp": bool(self.openmp) and reasons["_C"] is None,
        }
        path = modules["_C"].with_name("_build_info.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(info, indent=2) + "\n")

    def write_graph(self, folder: Path, targets: dict[str, Path]) -> Path:
        """Writes folder/build.ninja; paths in it are relative to the repository root, where ninja runs."""
        path = folder / "build.ninja"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            graph = Writer(file)

            def rule(name: str, *command: str) -> None:
                # $in, $out and $level are ninja's to fill in; everything else is data for the shell.
                words = [w if w in ("$in", "$out", "$out.d", "$level") else escape(shlex.quote(w)) for w in command]
                compiles = {"depfile": "$out.d", "deps": "gcc"} if "$out.d" in command else {}
                graph.rule(name, " ".join(words), description=f"{name} $out", **compiles)

            def compile(rule: str, source: Path, level: str = "baseline", flags: list[str] | None = None) -> str:
                target = str(folder / source.with_suffix(f".{level}.o"))
                words = [f"-DFASTAPD_LEVEL={level}", *(flags or [])]
                graph.build(target, rule, source.as_posix(), variables={"level": " ".join(words)})
                return target

            graph.variable("builddir", str(folder))
            rule("cxx", *self.cxx, *self.flags, "$level", "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out")
            rule("link", *self.cxx, *self.link_flags, "$in", "-o", "$out", *flags_of("LDFLAGS"))
            if "_C" in targets:
                # The linker keeps the first copy of a shared inline function (std::vector's, say). Baseline objects
                # come first, so that no AVX copy of one is called on a machine without AVX.
                objects = [compile("cxx", Path("csrc/bindings.cpp"))]
                sources = sorted(Path("csrc/cpu").glob("*.cpp"))
                for level, flags in self.levels.items():
                    for source in sources:
                        once = source.name.startswith("_") or source.name == "dispatch.cpp"
                        if level == "baseline" or not once:
                            objects.append(compile("cxx", source, level, flags))
                graph.build(str(targets["_C"]), "link", objects)
            if "_C_cuda" in targets:
                newest = max(self.archs, key=lambda arch: int(arch.rstrip("af")))
                codes = [(arch, f"sm_{arch}") for arch in self.archs] + [(newest, f"compute_{newest}")]
                gencode = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]
                nvcc = [self.nvcc, "-ccbin", self.cxx[0]] if len(self.cxx) == 1 else [self.nvcc]
                flags = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", *gencode]
                flags += ["-Xptxas=-warn-spills,-warn-lmem-usage"]
                rule("nvcc", *nvcc, *flags, "$level", "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out")
                # torch brings a libcudart of its own; the static one must not answer for it, nor the other way round.
                hide = "-Xlinker=--exclude-libs,ALL"
                rule("nvcc_link", *nvcc, "-shared", "-cudart=static", hide, *gencode, "$in", "-o", "$out")
                objects = [compile("cxx", Path("csrc/bindings_cuda.cpp"))]
                objects += [compile("nvcc", source) for source in sorted(Path("csrc/cuda").glob("*.cu"))]
                graph.build(str(targets["_C_cuda"]), "nvcc_link", objects)
        return path

    def run_ninja(self, graph: Path, target: Path) -> str | None:
        """Builds one target, passing ninja's output on as it comes; the first error when it fails."""
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-f", str(graph), str(target)]
        output = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                output.append(line)
        return error_line("".join(output)) if process.returncode else None


setup(
    # kernels/ lies beside fastapd/ for its readers; installed, it is a part of fastapd.
    packages=[*find_packages(include=["fastapd", "fastapd.*"]), "fastapd.kernels"],
    package_dir={"fastapd.kernels": "kernels"},
    ext_modules=[Extension("fastapd._C", []), Extension("fastapd._C_cuda", [])],
    cmdclass={"build_ext": NinjaBuildExt},
)
