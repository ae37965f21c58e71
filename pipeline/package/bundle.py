"""``verify.py``: the modules that check a package, each as it stands, in one file that can be read and run anywhere."""

from __future__ import annotations

from pathlib import Path

# What the program needs, those first that others import; nothing here imports more than the standard library to check.
MODULES = (
    *("errors", "digest", "task", "artifact", "package.ecdsa", "package.signature", "package.onnx_references"),
    *("package.retrieval_config", "package.adapter_files", "package.config", "package.contents", "package.graphs"),
    *("package.verify", "package.verify_script"),
)
_ROOT = Path(__file__).parents[1]
_HEAD = '''#!/usr/bin/env python3
"""Check the package in this folder before anything in it is trusted: python verify.py --help

Made of modules of qwen-onnx, each as it stands there. It needs Python 3.11 and nothing else; --replay needs the runtime
that README.md names. A script that came with a package tells whether it was damaged on the way. Whoever could replace
the package could replace the script too: check a signature with one that came another way.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("verify.py needs Python 3.11 or newer")
if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the package's own folder, where a json.py would be imported before anything is checked

import types



def _module(name, source):
    module = sys.modules[name] = types.ModuleType(name)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
    if source is None:
        module.__path__ = []
    else:
        exec(compile(source, name.replace(".", "/") + ".py", "exec"), module.__dict__)


_module("pipeline", None)
_module("pipeline.package", None)

'''
_TAIL = """
if __name__ == "__main__":
    sys.exit(sys.modules["pipeline.package.verify_script"].main(__file__))
"""


def verify_script() -> str:
    """The text of ``verify.py``.

    Raises:
        ValueError: a module would not come out as it stands.
    """
    parts = [_HEAD]
    for name in MODULES:
        text = (_ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
        if "'''" in text or text.endswith("\\"):
            raise ValueError(f"{name}.py does not fit into a raw string")
        parts.append(f"\n_module({f'pipeline.{name}'!r}, r'''{text}''')\n")
    return "".join(parts) + _TAIL
