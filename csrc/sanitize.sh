#!/bin/sh
# Builds the CPU kernels with AddressSanitizer and UBSan in a copy of the sources and runs the tests of the ops on them.
# Usage, from anywhere: csrc/sanitize.sh [pytest arguments]; PYTHON names the interpreter, ISAS what to run: by default
# all that this CPU can.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/setup.py" "$root/pyproject.toml" "$root/csrc" "$root/fastdiff" "$root/tests" "$work"
find "$work" -name "*.so" -delete
cd "$work"
# -O3 under the sanitizers compiles for minutes a file; the explicit vectors, and so the addresses, are the same
sed -i 's/"-O3"/"-O1"/' setup.py
# nor is code compiled that is not asked for; the base, which every build falls back on, then as fast as can be
for isa in v4 v3; do
    case " ${ISAS:-$isa} " in *" $isa "*) ;; *) sed -i "s/\"$isa\": \[[^]]*\], //" setup.py ;; esac
done
case " ${ISAS:-base} " in
*" base "*) ;;
*) sed -i 's/"-march=x86-64"\]/"-march=x86-64", "-O0", "-fno-sanitize=all"]/' setup.py ;;
esac
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
CXXFLAGS="$flags" LDFLAGS="$flags" FASTDIFF_REQUIRE_CPP=1 "$python" setup.py -q build_ext --inplace

library() { g++ -print-file-name="lib$1.so"; }
# Python itself is no leak test, and pybind11's exceptions need the C++ runtime loaded before the sanitizer
sanitized() {
    env ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(library asan) $(library ubsan) $(library stdc++)" "$@"
}

tests=""
for name in step q_sample time_embed group_norm_silu cpp group_norm_cpp norm_silu_conv norm_linear attention tape cells; do
    tests="$tests tests/ops/test_$name.py"
done
isas=${ISAS:-$(sanitized "$python" -c "from fastdiff import _cpu; print(*_cpu.isas)")}
# what the reference, Triton's interpreter and processes of their own do is none of this code's
others="not reference and not float64_is_the_formula and not interpreter and not triton and not instruction_sets"
for isa in $isas; do
    # shellcheck disable=SC2086
    sanitized env FASTDIFF_ISA="$isa" "$python" -m pytest $tests -k "$others" "$@"
done
