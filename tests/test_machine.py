"""What stands behind each target on this machine, and on machines with a driver that is not this one's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.facts import machine
from pipeline.facts.target import CPU, TARGETS

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc"), reason="a driver is made with gcc, as a library of Linux"
)


def is_installed(name: str) -> bool:
    return any(True for _ in metadata.distributions(name=name))


@pytest.mark.parametrize("name", TARGETS)
def test_what_runs_a_target_is_its_own_provider_or_the_processor_with_the_reason(name: str) -> None:
    row, found = TARGETS[name], machine.execution(TARGETS[name])
    if found.provider == row.provider:
        assert not found.missing or name == "openvino"  # whose provider has another device than the NPU
    else:
        assert found.provider in (CPU, "")
        assert found.missing
    assert found.device
    assert found.label() == f"{found.provider} ({found.device})"


def test_the_processor_runs_its_own_packages() -> None:
    assert machine.execution(TARGETS["cpu"]) == machine.Execution(CPU, "the processor")


@pytest.mark.skipif(sys.platform == "win32", reason="DirectML is there")
def test_directml_says_where_it_runs() -> None:
    assert machine.execution(TARGETS["directml"]).missing == "DirectML runs on Windows only"


def test_the_capability_table_says_of_each_target_what_runs_it_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["targets", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == list(TARGETS)
    for row in rows:
        assert row["executed_here"] == asdict(machine.execution(TARGETS[row["name"]]))
        assert {"provider", "dtypes", "kernels", "shapes", "runtime", "replay", "missing"} <= row.keys()

    assert cli.main(["targets"]) == 0
    table, _, reasons = capsys.readouterr().out.partition("\n\n")
    lines = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert list(lines) == list(TARGETS)
    for name, row in TARGETS.items():
        assert row.provider in lines[name]
        assert all(dtype in lines[name] for dtype in row.dtypes)
        lacks = row.missing or machine.execution(row).missing
        assert not lacks or any(line.split()[0] == name and lacks in line for line in reasons.splitlines()[2:])


# A CUDA driver as far as it is asked: whether it starts, and how many GPUs there are.
DRIVER = """
int cuInit(unsigned flags) {{ return flags ? 1 : {status}; }}
int cuDeviceGetCount(int *count) {{ *count = {gpus}; return {counted}; }}
"""


def with_driver(folder: Path, name: str, status: int = 0, gpus: int = 1, counted: int = 0) -> machine.Execution:
    """What a process finds for a target where ``libcuda.so.1`` answers so."""
    source = folder / "driver.c"
    source.write_text(DRIVER.format(status=status, gpus=gpus, counted=counted), encoding="utf-8")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(source)], check=True)
    code = (
        "import json, sys\nfrom dataclasses import asdict\nfrom pipeline.facts import machine, target\n"
        "print(json.dumps(asdict(machine.execution(target.TARGETS[sys.argv[1]]))))"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code, name], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return machine.Execution(**json.loads(done.stdout))


NO_GPU = {"a driver that does not start": {"status": 100}, "no GPU": {"gpus": 0}, "no answer": {"counted": 3}}


@needs_compiler
@pytest.mark.parametrize("case", NO_GPU)
def test_a_driver_without_a_gpu_runs_nothing(case: str, tmp_path: Path) -> None:
    found = with_driver(tmp_path, "cuda", **NO_GPU[case])
    assert (found.provider, found.missing) == (CPU, "an NVIDIA driver, but no GPU that it can use")


@needs_compiler
@pytest.mark.parametrize("name", ["cuda", "tensorrt-rtx"])
def test_a_gpu_without_the_runtime_says_what_to_install(name: str, tmp_path: Path) -> None:
    runtime = TARGETS[name].runtime
    if is_installed(runtime.package):
        pytest.skip(f"{runtime.package} is installed")
    found = with_driver(tmp_path, name)
    assert found.provider == CPU
    assert f"pip install '{runtime.package}=={runtime.minimum}'" in found.missing


@needs_compiler
@pytest.mark.parametrize("name", ["cuda", "tensorrt-rtx"])
def test_a_gpu_with_the_runtime_runs_what_that_runtime_has(name: str, tmp_path: Path) -> None:
    """The distribution's metadata is all that is looked at; a provider that is a plugin is not taken for there."""
    runtime = TARGETS[name].runtime
    site = tmp_path / f"{runtime.package.replace('-', '_')}-{runtime.minimum}.dist-info"
    site.mkdir()
    (site / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {runtime.package}\nVersion: {runtime.minimum}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        found = with_driver(tmp_path, name)
    if runtime.plugin:
        assert found.provider == CPU
        assert runtime.plugin in found.missing
    else:
        assert found == machine.Execution(TARGETS[name].provider, TARGETS[name].title)
