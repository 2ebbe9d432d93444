#!/bin/sh
# Runs the kernels' tests once for every path that this machine's processor has: portable, AVX-512 with BF16, AMX. Tests that
# compare products run every path anyway; here all others do too. Arguments go to the test binary.
set -eu
cd "$(dirname "$0")/.."
for processor in portable avx512 amx; do
    echo "=== $processor"
    PIVOTAL_PROCESSOR=$processor cargo test --release -p pivotal-kernels --lib -- "$@"
done
