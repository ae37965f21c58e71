"""The verbs of trust: check a package, sign one."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def verify(options: argparse.Namespace) -> int:
    from pipeline import golden, verify, verify_script
    from pipeline.report import Events

    replayed: dict[str, Any] = {}

    def replay(received: verify.Received) -> str:
        if received.manifest.generates:
            replayed.update(golden.replay(options.package, options.provider))
            return golden.told(replayed)
        from pipeline import retrieval_replay

        replayed.update(golden.replay_retrieval(options.package))
        return retrieval_replay.told(replayed)

    steps = (("runtime", verify.required_runtime), ("replay", replay)) if options.replay else ()
    report = verify.inspect(verify.Received(options.package, options.key), steps or (("runtime", verify.runtime),))
    facts = {"package": str(options.package), **report.as_dict()}
    if replayed:
        facts |= {"runtime": next(check.text for check in report.checks if check.name == "runtime"), "replay": replayed}
    if report.error:
        if not options.json:
            print("\n".join(verify_script.lines(report)), file=sys.stderr)
            raise report.error
        Events().emit("error", exit_code=report.error.exit_code, **report.error.as_dict(), **facts)
        return report.error.exit_code
    if options.json:
        print(json.dumps(facts))
        return 0
    print("\n".join(verify_script.lines(report)))
    print(f"{facts['name']}  digest {facts['digest']}")
    return 0


def sign(options: argparse.Namespace) -> int:
    from pipeline import signing
    from pipeline.artifact import SIGNED

    made = signing.sign(options.package, options.key, options.builder_id)
    if options.json:
        print(json.dumps({"package": str(options.package), **made}))
        return 0
    print(f"{options.package}: wrote {' and '.join(SIGNED)}, signed with the key {made['hint'][:16]}")
    print(f"next: qwen-onnx verify {options.package} --key PUBLIC.pem")
    return 0
