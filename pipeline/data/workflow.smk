# The steps of recipes as rules, one each: see steps.json, which `qwen-onnx workflow` has written beside this file.
# A rule's target is a mark named by the step's key. What the step makes is in the store, which Snakemake never touches:
# so it may forget, repeat or clean up as it likes, and a step that is there already costs a second.
import json
from pathlib import Path

STEPS = json.loads(Path(workflow.basedir, "steps.json").read_text(encoding="utf-8"))


def more(amount):
    # An attempt that was ended for want of memory or time gets more of it.
    return lambda wildcards, attempt: amount * attempt


rule all:
    input:
        [f"done/{step['mark']}" for step in STEPS if step["stage"] == "package"],


for step in STEPS:

    rule:
        name:
            step["name"]
        input:
            [f"done/{mark}" for mark in step["inputs"]],
        output:
            touch(f"done/{step['mark']}"),
        params:
            command=step["command"],
            # Not declared as a log, which Snakemake empties before each attempt.
            log=f"logs/{step['mark']}.log",
        threads: step["threads"]
        resources:
            mem_mb=more(step["mem_mb"]),
            runtime=more(step["runtime"]),
            disk_mb=step["disk_mb"],
        shell:
            "{params.command:q} >> {params.log:q} 2>&1 || {{ code=$?; tail -n 20 {params.log:q}; exit $code; }}"
