#!/usr/bin/env bash
# From a chat model and instructions that a program can check to an adapter that follows more of them, on SmolLM2-135M-Instruct:
#
#     examples/02_grpo_on_verifiable_instructions.sh "$(scripts/fetch_smollm2.sh DIRECTORY)" OUT
#
# Three steps show where to look, not a gain: docs/bench/onpolicy.md has the run that makes one, and its command.
set -euo pipefail

model=$1
out=$2
here="$(cd "$(dirname "$0")/.." && pwd)"
mkdir -p "$out"

# PIVOTAL names a program that is built already.
program=${PIVOTAL:-}
if [ -z "$program" ]; then
    (cd "$here" && cargo build --release)
    program="${CARGO_TARGET_DIR:-$here/target}/release/pivotal"
fi

# One held-out prompt of each kind; all 96 are for the recorded run.
head -n 8 "$here/fixtures/verifiable/held_out.jsonl" >"$out/held_out.jsonl"

echo "1. three steps: 6 prompts, 4 responses to each, scored by their checks, compared within their group"
"$program" grpo --model "$model" --data "$here/fixtures/verifiable/train.jsonl" --prompts 6 --samples 4 --max-new-tokens 32 \
    --temperature 0.8 --credit-selection all --lora-rank 16 --lr 1e-3 --steps 3 \
    --eval-data "$out/held_out.jsonl" --out "$out/run" --overwrite >"$out/summary.json"

python3 - "$out/run" <<'PYTHON'
import json, pathlib, sys

run = pathlib.Path(sys.argv[1])
lines = lambda name: [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]

print("2. metrics.jsonl: does the score rise, and do groups still differ? A flat group (all alike) trains nothing")
for step in lines("metrics.jsonl"):
    print(f"   step {step['step']}: score {step['score']:.2f}, flat groups {step['flat_group_fraction']:.2f}, "
          f"KL from the start {step['kl_k3']:.4f} nats a token, response {step['response_tokens']:.0f} tokens")

print("3. rollouts.jsonl: every response with its score and advantage; the best and the worst of the last step")
last = [rollout for rollout in lines("rollouts.jsonl") if rollout["step"] == 3]
for pick in (max, min):
    rollout = pick(last, key=lambda rollout: rollout["advantage"])
    print(f"   row {rollout['id']}, score {rollout['score']:.1f}, advantage {rollout['advantage']:+.2f}: {rollout['text'][:70]!r}")

print("4. evaluations.jsonl: held-out prompts, greedily, before and after (8 of them here: far too few to say anything)")
for evaluation in lines("evaluations.jsonl"):
    print(f"   after step {evaluation['step']}: share of checks held {evaluation['score']:.2f}")

print("5. timings.jsonl: where the time went")
seconds = [sum(step[f"{part}_seconds"] for step in lines("timings.jsonl")) for part in ("generation", "scoring", "update")]
print("   sampling {:.1f} s, scoring {:.1f} s, updates {:.1f} s".format(*seconds))
PYTHON
echo "the adapter, in peft's format: $out/run/adapter"
