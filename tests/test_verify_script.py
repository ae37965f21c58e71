"""The script that is shipped inside packages: what it is made of, and that it still reads what was shipped earlier."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import SIGNATURE
from pipeline.documents import index
from pipeline.errors import PackageError
from pipeline.package import bundle, verify

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures" / "packages"
KEY = ROOT / "tests" / "fixtures" / "signed.pub"  # of the packages that are signed; nobody has the private key any more


def script(package: Path, *arguments: str, site: bool = True) -> tuple[int, dict[str, Any]]:
    """The shipped script, in a process that has nothing of this project; without ``site`` nothing is installed."""
    script = package.parent / "verify.py"
    script.write_text(bundle.verify_script(), encoding="utf-8")
    command = [sys.executable, "-I", *([] if site else ["-S"]), str(script), str(package), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def source(name: str) -> str:
    """The text of a module of this project, named as in `bundle.MODULES`."""
    return (ROOT / "pipeline" / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")


def test_the_script_is_made_of_the_modules_as_they_stand(tmp_path: Path) -> None:
    text = bundle.verify_script()
    for name in bundle.MODULES:
        assert source(name) in text
    trees = (ast.parse(source(name)) for name in bundle.MODULES)
    nodes = [node for tree in trees for node in tree.body]
    imported = {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    imported |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    assert imported <= {*sys.stdlib_module_names, "pipeline", "__future__"}
    assert text == bundle.verify_script()


def test_every_code_is_documented_and_every_documented_code_exists() -> None:
    pattern = r"(?:signature|files|digests|manifest|configuration|data|runtime|replay|license)\.[a-z]+"
    code = "\n".join(map(source, (*bundle.MODULES, "runtime.golden")))
    used = set(re.findall(rf'"({pattern})"', code))
    documented = set(re.findall(rf"(?m)^\| `({pattern})`", (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")))
    assert len(used) > 15
    assert {name for name in used if not name.endswith((".json", ".py"))} == documented


@pytest.mark.parametrize("name", ["first", "signable"])
def test_packages_of_earlier_versions_keep_verifying(name: str, tmp_path: Path) -> None:
    folder = FIXTURES / name
    manifest = verify.package(folder)
    assert manifest.data["schema_version"] == 1
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000
    copy = tmp_path / name
    shutil.copytree(folder, copy)
    code, report = script(copy, site=False)
    assert code == 0, report
    if (folder / "verify.py").is_file():  # the script that was shipped then, and the signature
        command = [sys.executable, "-I", "-S", str(folder / "verify.py"), "--key", str(KEY), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, json.loads(done.stdout)["passed"]) == (0, True)


def test_nothing_of_the_package_is_imported_before_it_is_checked(tmp_path: Path) -> None:
    """Python looks for modules where its script lies first: one there would run before the first check."""
    copy = tmp_path / "package"
    shutil.copytree(FIXTURES / "first", copy)
    for name in ("json", "argparse", "types", "dataclasses", "hashlib", "re"):
        (copy / f"{name}.py").write_text("import os; os._exit(77)")
    (copy / "verify.py").write_text(bundle.verify_script(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "verify.py", "--json"], capture_output=True, text=True, check=False, cwd=copy
    )
    assert done.returncode == 9, done.stderr
    assert json.loads(done.stdout)["checks"][-1]["codes"] == ["files.extra"]


def test_a_signed_package_is_whole_to_the_index_and_to_the_next_build(tmp_path: Path) -> None:
    assert index._whole(FIXTURES / "signable").digest == verify.check_files(FIXTURES / "signable").digest
    copy = tmp_path / "package"
    shutil.copytree(FIXTURES / "signable", copy)
    (copy / SIGNATURE).unlink()  # what is left of the signature is not of the package
    with pytest.raises(PackageError, match="it is not the package that was built"):
        index._whole(copy)
