"""Wheels and editable installs, with a compiler and without."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# By metadata: merely looking for the module `pip` makes setuptools hand out the standard library's distutils.
TOOLS = {"scikit-build-core", "pybind11", "pip"} <= {
    re.sub(r"[-_.]+", "-", found.name).lower() for found in importlib.metadata.distributions()
}
NVCC = shutil.which("nvcc")
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}

pytestmark = [
    pytest.mark.skipif(not TOOLS, reason="needs pip, scikit-build-core and pybind11"),
    pytest.mark.timeout(900),
]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def pip(*arguments: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """pip without the network: the build tools are those of this environment, dependencies stay out."""
    ours = ("RLCORE_NATIVE", "RLCORE_CUDA", "SKBUILD_CMAKE_DEFINE")
    env = {key: value for key, value in os.environ.items() if key not in ours}
    command = [sys.executable, "-m", "pip", *arguments, "--no-index", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(command, env={**env, **variables}, capture_output=True, text=True)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def python(site: Path, code: str) -> str:
    """Run code with `site` before this environment's packages, and without its own install of rlcore."""
    env = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{sysconfig.get_path('purelib')}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=site, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads; it stays whole while the checkout changes."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("rlcore", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "-w", str(out), str(source), SKBUILD_CMAKE_DEFINE="RLCORE_WERROR=ON")
    return next(out.glob("*.whl"))


@needs_compiler
def test_wheel_holds_the_package_the_kernels_and_the_extension(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"rlcore", "rlcore-0.1.0.dist-info"}
    inside = {f"rlcore/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")}
    inside |= {str(path.relative_to(ROOT)) for path in (ROOT / "rlcore").rglob("*.py")}
    assert inside <= set(names)
    assert sum(name.startswith("rlcore/_native.") and not name.endswith(".pyi") for name in names) == 1
    assert not [name for name in names if name.startswith("rlcore/_cuda.")]
    assert {"rlcore/py.typed", "rlcore/_native.pyi"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


@needs_compiler
def test_wheel_needs_torch_and_numpy_only(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read("rlcore-0.1.0.dist-info/METADATA").decode().split("\n\n")[0]
    needed = [line.split(":", 1)[1].strip() for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert sorted(line for line in needed if "extra ==" not in line) == ["numpy", "torch>=2.8"]
    entry_points = archive.read("rlcore-0.1.0.dist-info/entry_points.txt").decode()
    assert "rlcore = rlcore.cli:main" in entry_points


@needs_compiler
def test_installed_wheel_is_native_and_has_kernels(wheel: Path, tmp_path: Path) -> None:
    pip("install", "--target", str(tmp_path), str(wheel))
    code = (
        "import rlcore, rlcore.kernels as k;print(rlcore.__file__, *k.__path__, rlcore.backends()['native'], sep='|')"
    )
    file, kernels, native = python(tmp_path, code).split("|")
    assert Path(file) == tmp_path / "rlcore" / "__init__.py"
    assert Path(kernels) == tmp_path / "rlcore" / "kernels"
    assert native == "live"
    assert "rlcore._cuda was not built" in python(tmp_path, "import rlcore; print(rlcore.backends()['cuda'])")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or NVCC is None, reason="needs a C++ compiler and nvcc")
def test_cuda_is_built_where_it_is_asked_for(source: Path, tmp_path: Path) -> None:
    pip("install", "--no-build-isolation", "--target", str(tmp_path), str(source),
        SKBUILD_CMAKE_DEFINE="RLCORE_WERROR=ON", RLCORE_CUDA="1")  # fmt: skip
    code = "import rlcore, rlcore._cuda as c; print(rlcore.backends()['native'], c.features()['cuda'])"
    native, version = python(tmp_path, code).split()
    assert native == "live" and int(version) > 0


@needs_compiler
def test_cuda_that_was_asked_for_and_can_not_be_built_is_an_error(source: Path, tmp_path: Path) -> None:
    done = pip("install", "--no-build-isolation", "--target", str(tmp_path), str(source), check=False,
               RLCORE_CUDA="1", CUDACXX="/bin/false")  # fmt: skip
    assert done.returncode != 0


@needs_compiler
def test_editable_install_sees_the_sources(source: Path, tmp_path: Path) -> None:
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    interpreter = next(path for path in (environment / "bin" / "python", environment / "Scripts" / "python.exe")
                       if path.exists())  # fmt: skip
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    # A path in a .pth file brings in the packages of this environment, but not its own editable install of rlcore.
    Path(site, "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip("--python", str(interpreter), "install", "--no-build-isolation", "-e", str(source))

    (source / "kernels" / "later.py").write_text("SEEN = True\n")
    code = (
        "import rlcore, rlcore.kernels as k, rlcore.kernels.later as later;"
        "print(rlcore.__file__, *k.__path__, rlcore.backends()['native'], later.SEEN, sep='|')"
    )
    try:
        done = subprocess.run([interpreter, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    finally:
        (source / "kernels" / "later.py").unlink()
    assert done.returncode == 0, done.stderr
    file, kernels, native, seen = done.stdout.strip().split("|")
    assert Path(file) == source / "rlcore" / "__init__.py"
    assert Path(kernels) == source / "kernels"
    assert (native, seen) == ("live", "True")


def test_sdist_holds_what_a_build_reads_and_no_environment(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "source")
    shutil.copy(ROOT / ".gitignore", copy)
    for name in (".venv/lib/rlcore", "runs/one", "tests"):
        copy.joinpath(name).mkdir(parents=True)
        copy.joinpath(name, "file.py").touch()
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "rlcore-0.1.0.tar.gz") as archive:
        names = archive.getnames()
    top = {name.split("/")[1] for name in names}
    assert top == {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", "csrc", "kernels", "rlcore"}
    assert "rlcore-0.1.0/csrc/cpu/segments.cpp" in names


def test_without_a_compiler_the_install_succeeds_and_says_so(source: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "--no-build-isolation", "--target", str(site), str(source), **NO_COMPILER)
    assert not list((site / "rlcore").glob("_native*.so"))
    code = """
import rlcore as rl, rlcore.kernels
state = rl.backends()
print(state["reference"], state["native"], sep="|")
try:
    with rl.backend("native"):
        pass
except RuntimeError as error:
    print(error)
"""
    first, error = python(site, code).split("\n")
    reference, native = first.split("|")
    assert reference == "live"
    assert "not built" in native and "compiler" in native
    assert native in error


def test_without_a_compiler_a_required_extension_is_an_error(source: Path, tmp_path: Path) -> None:
    install = ("install", "--no-build-isolation", "--target", str(tmp_path), str(source))
    done = pip(*install, check=False, RLCORE_NATIVE="1", **NO_COMPILER)
    assert done.returncode != 0
    assert not (tmp_path / "rlcore").exists()
