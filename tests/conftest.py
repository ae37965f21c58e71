"""What all tests share: no library reports home or asks the network, and tiny checkpoints are made once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from builds import Project

# Threads that wait do not spin: tests may share their cores, and spinning ones then take a hundred times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Maker of a tiny checkpoint, ``(model_type, tied=False) -> folder``, each made once; do not write into it."""
    from tiny import tiny_checkpoint

    @cache
    def made(model_type: str, tied: bool = False) -> Path:
        return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / model_type, model_type, tied)

    return made


@pytest.fixture(scope="session")
def vision_checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same of a model that sees, ``(model_type, tied=False, nested=False) -> folder``."""
    from tiny_vision import tiny_vision_checkpoint

    @cache
    def made(model_type: str, tied: bool = False, nested: bool = False) -> Path:
        return tiny_vision_checkpoint(tmp_path_factory.mktemp("checkpoint") / model_type, model_type, tied, nested)

    return made


@pytest.fixture(scope="session")
def tiny_package(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as Olive's ModelBuilder writes it, in float32, whose tokens are no near ties; read only."""
    from pipeline.export import exporter

    checkpoint = checkpoint_of("qwen2")
    folder = tmp_path_factory.mktemp("packages") / "tiny"
    folder.mkdir()
    exporter.export_genai(checkpoint, folder, {}, "CPUExecutionProvider", "float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(checkpoint / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[..., Path]) -> Callable[..., Project]:
    """Maker of a project that has been built, ``(model_type, exporter)``, each once; do not write into it."""
    import builds

    @cache
    def made(model_type: str = "qwen2", exporter: str = "genai") -> Project:
        project = builds.new_project(tmp_path_factory.mktemp("built"), checkpoint_of(model_type), exporter)
        assert builds.stages(builds.build(project), "done") == builds.STAGES
        return project

    return made


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the robustness table as far as it was run: case, expected, observed."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    reports = [report for report in reports if report.when == "call" and report.user_properties]
    if reports:
        import robustness

        terminalreporter.section("robustness")
        for line in robustness.summary(robustness.observed_rows(reports)):
            terminalreporter.line(line)
