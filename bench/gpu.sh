#!/usr/bin/env bash
# Builds, tests and measures on one machine with a GPU, without a network, in under eight minutes.
#
#   bench/gpu.sh              results in $OUT, or in bench/results/<gpu>/ where that is not set: gpu.json, gpu.md, logs
#   bench/gpu.sh --quick      tiny shapes, on the CPU too: checks this script, measures nothing
#   bench/gpu.sh --help       the rest
#
# PYTHON names the interpreter (default: python3, 3.11 or newer) that has torch, triton, pytest, pybind11,
# scikit-build-core, cmake and ninja; nvcc is on the PATH. Exit status: 0 if every part was done and every test passed.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" bench/gpu/run.py "$@"
