"""What `import rlcore` costs and needs, and what the repository root holds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import rlcore

ROOT = Path(__file__).resolve().parents[1]
HOUSE = {
    "pyproject.toml", "Makefile", "constraints.txt", "csrc", "kernels", "rlcore", "tests", "bench", "docs",
    "README.md", "LICENSE", "CHANGELOG.md",
}  # fmt: skip


def run(code: str, *options: str, cwd: Path | None = None, pythonpath: str = "") -> str:
    """The stdout of `python options -c code`; the test fails with its stderr."""
    env = {**os.environ, "PYTHONPATH": pythonpath, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run([sys.executable, *options, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_costs_less_than_100_ms_beyond_torch(tmp_path: Path) -> None:
    # Processor time, since other tests run beside this one; the first process leaves the bytecode an install has.
    code = "import time, torch; start = time.process_time(); import rlcore; print(time.process_time() - start)"
    cost = min(float(run(code, cwd=tmp_path)) for _ in range(5))
    assert cost < 0.100, f"import rlcore took {1e3 * cost:.0f} ms beyond import torch"


def test_import_brings_in_torch_and_numpy_only(tmp_path: Path) -> None:
    code = """
import sys, torch, numpy
before = set(sys.modules)
import rlcore
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
print(*sorted({"transformers", "triton"} & set(sys.modules)))
"""
    extra, heavy = run(code, cwd=tmp_path).split("\n")[:2]
    assert set(extra.split()) <= {"rlcore", "torch", "numpy"}
    assert heavy == ""


def test_version_is_that_of_the_installed_distribution() -> None:
    assert rlcore.__version__ == importlib.metadata.version("rlcore")


def requirements(name: str, seen: set[str]) -> set[str]:
    """The distribution and all that it needs, normalized names."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    try:
        needed = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return seen
    if name not in seen:
        seen.add(name)
        for line in needed:
            if "extra ==" not in line:
                requirements(re.split(r"[^A-Za-z0-9_.-]", line)[0], seen)
    return seen


def test_core_runs_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    """Every module below the engine imports, and the public names work, where nothing else is installed."""
    site = Path(sysconfig.get_path("purelib"))
    for distribution in requirements("numpy", requirements("torch", set())):
        for name in {file.parts[0] for file in importlib.metadata.files(distribution) or []} - {"..", "__pycache__"}:
            tmp_path.joinpath(name).symlink_to(site / name)
    tmp_path.joinpath("rlcore").symlink_to(ROOT / "rlcore")
    code = """
import importlib.util, pkgutil, torch, rlcore as rl
for name in ("transformers", "tyro", "rich", "safetensors", "reasoning_gym", "matplotlib"):
    assert importlib.util.find_spec(name) is None, name
for module in pkgutil.walk_packages(rl.__path__, "rlcore."):
    if module.name.split(".")[1] not in ("engine", "adapters", "cli"):
        importlib.import_module(module.name)
for name in rl.__all__:
    getattr(rl, name)

logits = torch.randn(5, 11, requires_grad=True)
target = torch.arange(5)
logp = rl.logprob(logits, target).logp
torch.testing.assert_close(logp, logits.log_softmax(-1)[torch.arange(5), target])
advantage = rl.group_advantage(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
batch = rl.TokenBatch(target, offsets=torch.tensor([0, 2, 5]), advantage=advantage)
loss, metrics = rl.policy_loss(logp, batch, rl.Objective())
loss.backward()
assert torch.isfinite(logits.grad).all()
print("ran")
"""
    assert run(code, "-S", cwd=tmp_path, pythonpath=str(tmp_path)) == "ran\n"


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    run(blocks[0] + "assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()", cwd=tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.timeout(600)
def test_transformers_finds_its_own_kernels_package_from_the_repository_root(tmp_path: Path) -> None:
    """`kernels/` here is no regular package, so a `kernels` distribution further down sys.path wins over it."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent.joinpath("utils", "import_utils.py").read_text()
    found = re.search(r'KERNELS_MIN_VERSION = "([^"]+)"', source)
    version = found.group(1) if found else "0.10.0"
    stub = tmp_path / "kernels"
    stub.mkdir()
    stub.joinpath("__init__.py").write_text(
        "class Anything:\n"
        "    def __init__(self, *args, **kwargs): pass\n"
        "    def __call__(self, decorated): return decorated\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return Anything\n"
    )
    info = tmp_path / f"kernels-{version}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    info.joinpath("RECORD").write_text(f"kernels/__init__.py,,\n{info.name}/METADATA,,\n")
    code = """
import sys
assert sys.path[0] == ""
import kernels
print(kernels.__file__)
from transformers.utils.import_utils import is_kernels_available
import transformers.models.qwen3.modeling_qwen3
print(is_kernels_available())
"""
    path, available = run(code, cwd=ROOT, pythonpath=str(tmp_path)).split()
    assert Path(path) == stub / "__init__.py"
    assert available == str(found is not None)


def test_root_holds_the_house_and_nothing_else() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {line.split("/")[0] for line in listed.splitlines()}
    assert {name for name in names if not name.startswith(".")} == HOUSE
    assert not (ROOT / "kernels" / "__init__.py").exists(), "a regular package `kernels` shadows Hugging Face's"
