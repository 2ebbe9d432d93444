#!/bin/sh
# Runs the kernels' tests as on a processor without AVX-512 (Haswell: AVX2 and FMA, what the build asks for at least), in
# QEMU's user mode. Arguments go to the test binary, for example a part of the names of the tests to run.
set -eu
cd "$(dirname "$0")/.."
if ! command -v qemu-x86_64 >/dev/null; then
    echo "skipped: qemu-x86_64 is not installed (Debian: apt-get install qemu-user)"
    exit 0
fi
if [ "$(uname -m)" != x86_64 ]; then
    echo "skipped: this is not an x86-64 machine"
    exit 0
fi
binary=$(cargo test --release -p pivotal-kernels --lib --no-run --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*pivotal_kernels[^"]*\)".*/\1/p' | tail -n 1)
[ -n "$binary" ] || { echo "the test binary could not be built" >&2; exit 1; }
# These three take minutes each in an emulator and have smaller siblings.
exec qemu-x86_64 -cpu Haswell "$binary" \
    --skip few_rows_against_a_large_weight --skip a_family_with_much_work \
    --skip all_forms_agree_with_f64_over_odd_shapes "$@"
