#!/bin/sh
# One part of the work on a machine with a GPU, from the root of the checkout; each part ends within 9 minutes.
#
#     benchmarks/gpu.sh check      correctness: pytest -m gpu
#     benchmarks/gpu.sh ops        every kernel, checked, then timed
#     benchmarks/gpu.sh smoke      networks and loops, a little of all
#     benchmarks/gpu.sh unet       DDPM-CIFAR10 at every batch with every rival, and what else there is time for
#     benchmarks/gpu.sh sampler    the same of whole loops
#     benchmarks/gpu.sh cold       the first image of a new process, ours and the rival's
#     benchmarks/gpu.sh edm|adm    the larger networks; their rows join those of the same commit
#
# PYTHON names the interpreter. What the compiler says goes to gpu.log. Results go to OUT, else to
# benchmarks/results/<device>/.
set -eu
python=${PYTHON:-python}
: > gpu.log

run() {
    timeout 535 "$python" benchmarks/run.py "$@" --device cuda ${OUT:+--out "$OUT"} 2>> gpu.log || {
        code=$?
        tail -n 20 gpu.log >&2
        exit "$code"
    }
}

case ${1:-} in
check) timeout 535 "$python" -m pytest -m gpu -x ;;
ops) run ops ;;
smoke)
    OUT=${OUT:+$OUT/smoke}
    run unet --smoke --budget 245
    run sampler --smoke --budget 245
    ;;
unet) run unet --budget 500 ;;
sampler) run sampler --budget 500 ;;
cold) run sampler --only "cold start" --budget 500 ;;
edm)
    run unet --only EDM --budget 245
    run sampler --only EDM --budget 245
    ;;
adm)
    run unet --only ADM --budget 245
    run sampler --only ADM --budget 245
    ;;
*)
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
