"""What the process imports that steps are forked from: nothing that starts a thread or reads a file of the build."""

import contextlib
import importlib

from pipeline.builds import worker

_MODULES = ("onnx", "torch", "transformers", "olive.passes.onnx.model_builder")
# transformers imports a class when it is asked for.
_CLASSES = ("AutoModelForCausalLM", "AutoTokenizer", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

worker.quiet_libraries()
with contextlib.suppress(ImportError):  # what is not installed, the step that needs it will say
    for _name in _MODULES:
        importlib.import_module(_name)
    for _name in _CLASSES:
        getattr(importlib.import_module("transformers"), _name)
