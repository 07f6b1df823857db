#!/bin/sh
# Builds the CPU kernels with AddressSanitizer and UBSan in a copy of the sources and runs the tests of the ops on them.
# Usage, from anywhere: csrc/sanitize.sh [pytest arguments]; PYTHON names the interpreter, ISAS what this CPU runs.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/setup.py" "$root/pyproject.toml" "$root/csrc" "$root/fastdiff" "$root/tests" "$work"
find "$work" -name "*.so" -delete
cd "$work"
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
CXXFLAGS="$flags" LDFLAGS="$flags" FASTDIFF_REQUIRE_CPP=1 "${PYTHON:-python}" setup.py -q build_ext --inplace
library() { g++ -print-file-name="lib$1.so"; }
for isa in ${ISAS:-v4 v3 base}; do
    # Python itself is no leak test, and pybind11's exceptions need the C++ runtime loaded before the sanitizer
    env FASTDIFF_ISA="$isa" ASAN_OPTIONS=detect_leaks=0 \
        LD_PRELOAD="$(library asan) $(library ubsan) $(library stdc++)" \
        "${PYTHON:-python}" -m pytest tests/ops/test_step.py tests/ops/test_q_sample.py "$@"
done
