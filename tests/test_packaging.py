"""Wheel and sdist: built from the checkout, installed where nothing else is, and used from another folder."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import agsurgery

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command that sees neither this checkout nor the settings of this process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from the sdist."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built):
    wheel = one(built, "*.whl")
    assert wheel.name == f"agsurgery-{agsurgery.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"agsurgery-{agsurgery.__version__}.dist-info/METADATA").decode()
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    sources = (ROOT / "agsurgery").rglob("*")
    expected = {str(p.relative_to(ROOT)) for p in sources if p.suffix in {".py", ".typed"}}
    assert package == expected
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    assert [line for line in needed if "extra ==" not in line] == ["Requires-Dist: torch>=2.10"]
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_sdist_holds_what_it_takes_to_test_and_document_it(built):
    with tarfile.open(one(built, "*.tar.gz")) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for name in (
        "Makefile",
        "constraints.txt",
        "constraints-min.txt",
        "docs/conf.py",
        "tests/test_packaging.py",
        "examples/quickstart.py",
        "benchmarks/results/step_cost.json",
    ):
        assert name in names
    assert not any(name.startswith(("runs/", ".venv", "docs/_build")) for name in names)


@pytest.mark.slow
def test_wheel_runs_the_quickstart_from_another_folder(built, tmp_path):
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    )
    # torch is large: it is borrowed from here. An editable agsurgery is not, since a path in a .pth is no site folder.
    site.joinpath("torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    install = ["install", "--quiet", "--no-index", "--no-deps", one(built, "*.whl")]
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    where = run(python, "-c", "import agsurgery; print(agsurgery.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    shutil.copy(ROOT / "examples" / "quickstart.py", tmp_path)
    lines = run(python, "quickstart.py", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["Sum", "AGS"]
    version = "import importlib.metadata as m; print(m.version('agsurgery'))"
    assert run(python, "-c", version, cwd=tmp_path).strip() == agsurgery.__version__
