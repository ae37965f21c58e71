#!/usr/bin/env bash
# Builds one package in CI, whichever system it is: run it in a clone, with Python 3.11 and make.
#
#   deploy/ci/build.sh              all that follows, in order
#   deploy/ci/build.sh prepare      install the pinned tools
#   deploy/ci/build.sh build        build the package; report, summary and JUnit are written whether or not it passes
#   deploy/ci/build.sh check        verify the package and replay its golden answers, as its receiver would
#
# Variables: TARGET (cpu), SCHEME (int4), MODEL (the Makefile's default), OUT (artifacts/ci).
# What is to be kept is below OUT: packages/ the package; results/ summary.json, junit.xml, verify.json, report.html.
set -euo pipefail
cd "$(dirname "$0")/../.."
export CI=true # recipes that name a branch are refused
target=${TARGET:-cpu}
scheme=${SCHEME:-int4}
model=${MODEL:-qwen2.5-coder-0.5b-instruct}
out=${OUT:-artifacts/ci}
name=$model-$target-$scheme

prepare() {
    make .venv/ready
    if [ "$target" = openvino ]; then make .venv-openvino; fi
}

build() {
    mkdir -p "$out/results"
    make "$target" MODEL="$model" SCHEME="$scheme" \
        OPTIONS="--locked --out '$out/packages' --summary '$out/results/summary.json' --junit '$out/results/junit.xml'"
    cp "$out/packages/$name/report.html" "$out/results/"
}

check() {
    .venv/bin/qwen-onnx verify "$out/packages/$name" --replay --json | tee "$out/results/verify.json"
}

case ${1:-all} in
    prepare | build | check) "$1" ;;
    all)
        prepare
        build
        check
        ;;
    *)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
