"""What the two distributions hold: every file of their packages, what builds them and the licence, nothing else."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
pytest.importorskip("pybind11")

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tracked files, and their names."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    folder = tmp_path_factory.mktemp("checkout")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder, names


def build(folder, *words):
    """Run Python in a folder as an installer does, without this checkout on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def files_below(names, *folders):
    return {name for name in names if name.startswith(folders)}


def made_by_setuptools(name):
    return name.endswith(("PKG-INFO", "setup.cfg")) or ".egg-info/" in name


@pytest.mark.parametrize(
    ("where", "folders", "files"),
    [
        (".", ("inverseq/", "csrc/"), {"LICENSE", "README.md", "MANIFEST.in", "pyproject.toml", "setup.py"}),
        ("kernels", ("inverseq_kernels/",), {"LICENSE", "README.md", "pyproject.toml"}),
    ],
)
def test_a_source_distribution_is_what_is_built_and_the_licence(checkout, tmp_path, where, folders, files):
    folder, names = checkout
    build(folder / where, "-c", BUILD, "build_sdist", tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        found = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    tracked = names if where == "." else [name.removeprefix(f"{where}/") for name in files_below(names, f"{where}/")]
    assert {name for name in found if not made_by_setuptools(name)} == files_below(tracked, *folders) | files


def test_the_package_is_installed_with_its_recipes_texts_and_prompts(checkout, tmp_path):
    folder, names = checkout
    build(folder, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == files_below(names, "inverseq/")


def test_the_wheel_of_the_kernels_holds_the_package_and_the_licence(checkout, tmp_path):
    folder, names = checkout
    build(folder / "kernels", "-c", BUILD, "build_wheel", tmp_path)
    with zipfile.ZipFile(next(tmp_path.glob("*-py3-none-any.whl"))) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licences = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
        assert [wheel.read(name) for name in licences] == [(ROOT / "LICENSE").read_bytes()]
    assert found == {name.removeprefix("kernels/") for name in files_below(names, "kernels/inverseq_kernels/")}
