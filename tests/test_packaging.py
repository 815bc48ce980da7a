"""The wheel holds what the tree holds."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = {"exporters": "gemma_deploy/exporters", "runtime": "gemma_deploy/runtime"}


def expected_files() -> set[str]:
    """Return the wheel paths of every Python and data file of the three rooms."""
    files = set()
    for path in ROOT.glob("gemma_deploy/**/*"):
        relative = path.relative_to(ROOT).as_posix()
        is_linked = relative.split("/")[1] in ROOMS
        if not is_linked and path.suffix in {".py", ""} and path.is_file():
            files.add(relative)
    files.add("gemma_deploy/py.typed")
    for room, package in ROOMS.items():
        for path in (*(ROOT / room).rglob("*.py"), *(ROOT / room).rglob("*.txt")):
            files.add(f"{package}/{path.relative_to(ROOT / room).as_posix()}")
    return {file for file in files if "__pycache__" not in file}


def test_wheel_equals_the_tree(tmp_path: Path) -> None:
    # Of a copy: setuptools reuses what earlier builds left in the tree.
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "samples", "tests", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected_files()


def test_the_import_contract_names_every_shared_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (named,) = [set(c["source_modules"]) for c in contracts if c["type"] == "forbidden"]
    may_import_the_rooms = {
        "__init__",
        "__main__",
        "api",
        "cli",
        "exporters",
        "lm_eval_model",
        "runtime",
    }
    files = {path.stem for path in (ROOT / "gemma_deploy").glob("*.py")}
    folders = {path.parent.name for path in (ROOT / "gemma_deploy").glob("*/__init__.py")}
    modules = (files | folders) - may_import_the_rooms
    assert named == {f"gemma_deploy.{module}" for module in modules}
