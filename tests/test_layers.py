"""The floors of the house: who may import whom, as pyproject.toml writes it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from pipeline import stages
from pipeline.builds import plan

ROOT = Path(__file__).parent.parent


def test_the_contracts_hold() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_module_has_a_floor() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {item["name"]: item for item in settings["tool"]["importlinter"]["contracts"]}
    for contract, folder in (("floors", ROOT / "pipeline"), ("floors of the server", ROOT / "pipeline" / "serve")):
        parent = ".".join(folder.relative_to(ROOT).parts)
        named = [name for floor in contracts[contract]["layers"] for name in re.split(r"\s*[|:]\s*", floor)]
        packages = (path.parent for path in folder.glob("*/__init__.py"))
        found = [f"{parent}.{path.stem}" for path in (*folder.glob("*.py"), *packages)]
        assert sorted(named) == sorted(name for name in found if "__" not in name)


def test_what_is_planned_is_what_can_be_run() -> None:
    """The plan knows the stages without importing them; the table that runs them has the same ones."""
    modules = {path.stem for path in (ROOT / "pipeline" / "stages").glob("*.py")} - {"__init__"}
    planned = [stage.name for stage in plan.STAGES]
    assert list(stages.STAGES) == planned
    assert set(planned) == modules
    for index, stage in enumerate(plan.STAGES):
        assert set(stage.inputs) <= set(planned[:index])
        assert stages.STAGES[stage.name].__module__ == f"pipeline.stages.{stage.name}"
