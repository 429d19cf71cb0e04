"""Builds the native libraries; all metadata is in pyproject.toml.

``latentfast/_native_cpu.so`` is always built, ``latentfast/_native_direct.so`` (Python's way past torch's dispatcher
to the others) where there are Python's headers, ``latentfast/_native_cuda.so`` where it makes sense:

* ``LATENTFAST_CUDA`` unset: when nvcc and a GPU are found; ``1``: always, an error without nvcc; ``0``: never.
* ``LATENTFAST_BUILD=0``: nothing is built, the install is pure Python.

They use torch's stable ABI and Python's limited API alone, so one build serves every torch ≥ 2.10 and every Python ≥
3.10. ninja does the work in ``build/native``, so a second build compiles what has changed.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # --no-build-isolation does not look at what pyproject.toml requires
    raise SystemExit(
        f"setuptools 77 or newer is needed, found {setuptools.__version__}: pip install 'setuptools>=77'"
    ) from None

ROOT = Path(__file__).resolve().parent
WORK = ROOT / "build" / "native"
PACKAGE = "latentfast"
LIBRARIES = ("_native_cpu.so", "_native_direct.so", "_native_cuda.so")

# csrc/cpu/loops.cpp is compiled once for each, the best first; the library picks one when it is loaded.
INSTRUCTION_SETS = {
    "x86_64": {
        "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
        "avx2": "-march=x86-64-v3",
        "baseline": "-march=x86-64",
    },
}
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000 -std=c++20"
# No contraction and no instruction set of its own: results must not depend on the machine that built the library.
CXX_FLAGS = f"{STABLE_ABI} -O3 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra"
LOOP_FLAGS = "-fno-math-errno -fno-trapping-math"  # let square roots and conditions become vector code
NVCC_FLAGS = (
    f"{STABLE_ABI} -DUSE_CUDA -O3 --expt-relaxed-constexpr -gencode arch=compute_80,code=sm_80 "
    "-gencode arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90 "
    "-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
)


def wants_build() -> bool:
    return switch("LATENTFAST_BUILD") is not False


def switch(name: str) -> bool | None:
    """An environment variable that is 1, 0 or unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0, 1 or unset, got '{value}'")
    return None if value == "" else value == "1"


def first_line(*command: str) -> str | None:
    """The first line that a command prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [""])[0]


def torch_folder() -> Path:
    """Where torch is, without the seconds that importing it takes."""
    spec = util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "latentfast's native libraries are built against the torch that you run, and torch was not found: install "
            "torch, then latentfast with --no-build-isolation; or set LATENTFAST_BUILD=0 to do without native code"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(Path(home) / "bin") for home in homes if home] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def has_gpu() -> bool:
    if (first_line("nvidia-smi", "-L") or "").startswith("GPU "):
        return True
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@dataclass
class Plan:
    """What is built, and one line that says so: kept in latentfast/_build_info.py for the doctor to repeat."""

    built: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    compiler: str = ""
    nvcc: str | None = None
    python_headers: str | None = None

    @property
    def cpu(self) -> bool:
        return bool(self.built)

    @property
    def libraries(self) -> tuple[str, ...]:
        wanted = (self.cpu, self.python_headers is not None, self.nvcc is not None)
        return tuple(name for name, is_wanted in zip(LIBRARIES, wanted, strict=True) if is_wanted)

    @property
    def summary(self) -> str:
        return "; ".join([f"built {' and '.join(self.built) or 'nothing'}", *self.left_out])


def make_plan() -> Plan:
    plan = Plan()
    if not wants_build():
        plan.left_out.append("pure Python because LATENTFAST_BUILD=0")
        return plan
    if sys.platform != "linux":
        plan.left_out.append(f"pure Python because the native libraries know Linux alone, not {sys.platform}")
        return plan
    plan.compiler = os.environ.get("CXX") or "c++"
    version = first_line(*shlex.split(plan.compiler), "--version")
    if version is None:
        raise SystemExit(
            f"no C++ compiler: '{plan.compiler}' does not run; set CXX, or LATENTFAST_BUILD=0 to do without"
        )
    torch_folder()
    sets = ", ".join(instruction_sets())
    plan.built.append(f"native-cpu ({sets}; {version}; torch {metadata.version('torch')})")

    headers = sysconfig.get_path("include")
    if (Path(headers) / "Python.h").exists():
        plan.python_headers = headers
    else:
        plan.left_out.append(f"no direct door because there is no Python.h in {headers}")

    wish, nvcc = switch("LATENTFAST_CUDA"), find_nvcc()
    if wish is False:
        plan.left_out.append("no cuda because LATENTFAST_CUDA=0")
    elif nvcc is None:
        if wish:
            raise SystemExit(
                "LATENTFAST_CUDA=1 asks for the CUDA library, but there is no nvcc on PATH or under CUDA_HOME"
            )
        plan.left_out.append("no cuda because there is no nvcc")
    elif wish is None and not has_gpu():
        plan.left_out.append("no cuda because there is no GPU (LATENTFAST_CUDA=1 builds it all the same)")
    else:
        release = first_line("sh", "-c", f"{shlex.quote(nvcc)} --version | grep -o 'V[0-9.]*'")
        plan.built.append(f"cuda (sm_80, sm_90, PTX; nvcc {release})")
        plan.nvcc = nvcc
    return plan


def instruction_sets() -> dict[str, str]:
    return INSTRUCTION_SETS.get(platform.machine(), {"baseline": ""})


def ninja_file(plan: Plan, torch: Path) -> str:
    """The build as ninja's rules. Depfiles make it incremental; ninja compares commands, so changed flags rebuild."""
    include = f"-I{ROOT / 'csrc'} -isystem {torch / 'include'}"
    sets = instruction_sets()
    names = " ".join(f"M({name})" for name in sets)
    torch_libraries = f"-L{torch / 'lib'} -lc10 -ltorch_cpu -ltorch"
    lines = [
        "rule cxx",
        f"  command = {plan.compiler} {CXX_FLAGS} {include} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {plan.compiler} -shared $in -o $out $libraries",
    ]
    objects = []
    shared = ROOT / "csrc" / "common" / "operators.cpp"
    for source in [shared, *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]:
        flags = {"": ""}
        if source.stem == "loops":
            flags = {f"_{name}": f"{LOOP_FLAGS} {march} -DLATENTFAST_ISA={name}" for name, march in sets.items()}
        elif source.stem == "loops_select":
            flags = {"": f"'-DLATENTFAST_ISAS(M)={names}'"}
        for suffix, extra in flags.items():
            objects.append(f"cpu/{source.stem}{suffix}.o")
            lines += [f"build {objects[-1]}: cxx {source}", f"  flags = {extra}"]
    lines += [f"build {LIBRARIES[0]}: link {' '.join(objects)}", f"  libraries = -Wl,--no-as-needed {torch_libraries}"]
    if plan.python_headers is not None:  # knows torch through its Python objects alone, and DLPack's header
        lines += [
            f"build direct.o: cxx {ROOT / 'csrc' / 'python' / 'direct.cpp'}",
            f"  flags = -UTORCH_TARGET_VERSION -isystem {plan.python_headers}",
            f"build {LIBRARIES[1]}: link direct.o",
        ]
    if plan.nvcc is not None:
        lines += [
            "rule nvcc",
            f"  command = {plan.nvcc} {NVCC_FLAGS} {include} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvlink",
            f"  command = {plan.nvcc} -shared -cudart static $in -o $out "
            f"-Xlinker --no-as-needed,--exclude-libs,ALL {torch_libraries}",
        ]
        objects = []
        for source in [shared, *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]:
            objects.append(f"cuda/{source.name}.o")
            lines += [f"build {objects[-1]}: nvcc {source}"]
        lines += [f"build {LIBRARIES[2]}: nvlink {' '.join(objects)}"]
    return "\n".join(lines) + "\n"


def run_ninja(plan: Plan) -> None:
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if ninja is None:
        raise SystemExit("ninja is needed to build the native libraries: pip install ninja, or set LATENTFAST_BUILD=0")
    import fcntl  # Linux is all that gets here

    WORK.mkdir(parents=True, exist_ok=True)
    try:
        with open(WORK / "lock", "w") as lock:  # two builds of one checkout would spoil ninja's log
            fcntl.flock(lock, fcntl.LOCK_EX)
            (WORK / "build.ninja").write_text(ninja_file(plan, torch_folder()))
            subprocess.run([ninja, "-C", str(WORK), *plan.libraries], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"the native build failed (ninja ended with {error.returncode}, see above)") from None


def put_build_info(plan: Plan, package: Path) -> None:
    package.mkdir(parents=True, exist_ok=True)
    text = f'"""What setup.py built; written by it."""\n\nSUMMARY = {plan.summary!r}\n'
    (package / "_build_info.py").write_text(text)


def put_libraries(plan: Plan, package: Path) -> None:
    """Put the built libraries into a package folder, and take away what an earlier build left there."""
    for name in LIBRARIES:
        target = package / name
        if name not in plan.libraries:
            target.unlink(missing_ok=True)
            continue
        package.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f"{name}.new")
        shutil.copyfile(WORK / name, fresh)
        os.replace(fresh, target)  # a process that has the old one loaded keeps it


class BuildPython(build_py):
    """Adds _build_info.py, also where nothing is built."""

    def run(self) -> None:
        super().run()
        plan = make_plan()
        in_place = self.editable_mode
        put_build_info(plan, ROOT / PACKAGE if in_place else Path(self.build_lib) / PACKAGE)
        if in_place and not plan.cpu:
            put_libraries(plan, ROOT / PACKAGE)


class BuildNative(build_ext):
    """Runs ninja in place of setuptools' compiler."""

    def run(self) -> None:
        plan = make_plan()
        if plan.cpu:
            run_ninja(plan)
        package = ROOT / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        put_libraries(plan, package)
        put_build_info(plan, package)
        print(f"latentfast: {plan.summary}", flush=True)

    def get_outputs(self) -> list[str]:
        folder = ROOT / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        return [str(folder / name) for name in LIBRARIES if (folder / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """The libraries use Python's limited API at most: one wheel serves every Python 3 of the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if wants_build() else tag


setup(
    packages=[*find_packages(include=[PACKAGE, f"{PACKAGE}.*"]), f"{PACKAGE}.kernels.triton"],
    package_dir={f"{PACKAGE}.kernels.triton": "kernels/triton", f"{PACKAGE}.benchmarks": "benchmarks"},
    package_data={
        f"{PACKAGE}.tiny": ["weights/**", "*.json", "*.md"],
        f"{PACKAGE}.cli": ["templates/**"],
        f"{PACKAGE}.studio": ["static/*"],
        f"{PACKAGE}.benchmarks": ["results/*.jsonl", "README.md"],
    },
    ext_modules=[Extension(f"{PACKAGE}._native", [])] if wants_build() else [],  # the sources are ninja's business
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative, "bdist_wheel": Wheel},
)
