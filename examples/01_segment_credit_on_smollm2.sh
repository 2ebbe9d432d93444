#!/usr/bin/env bash
# From a chat model and a file of preferences to adapters trained with segment credit, on SmolLM2-135M-Instruct:
#
#     examples/01_segment_credit_on_smollm2.sh "$(scripts/fetch_smollm2.sh DIRECTORY)" OUT
#
# Two signals, one after the other: a reward model's token values, and the log-ratio of a DPO-trained oracle. Three steps
# each show that the chain holds together, not that the model gets better: that takes data and steps of its own.
set -euo pipefail

model=$1
out=$2
here="$(cd "$(dirname "$0")/.." && pwd)"
data="$here/fixtures/preferences.jsonl"
mkdir -p "$out"

# PIVOTAL names a program that is built already.
program=${PIVOTAL:-}
if [ -z "$program" ]; then
    (cd "$here" && cargo build --release)
    program="${CARGO_TARGET_DIR:-$here/target}/release/pivotal"
fi
pivotal() { "$program" "$@"; }

common=(--model "$model" --data "$data" --max-tokens 160)
# The log-ratio lies around 0 by its nature; a small band keeps noise from cutting at every other token.
band=(--credit-offset-std 0.25)
short=(--lora-rank 8 --batch 4 --steps 3)

echo "1. a reward model that gives every token a value"
pivotal reward "${common[@]}" "${short[@]}" --out "$out/reward" >"$out/reward.json"

echo "2. its values as the signal: around their own mean, cut where they leave a band of half a standard deviation"
pivotal annotate "${common[@]}" --signal level --reward-model "$out/reward" \
    --credit-baseline batch_mean --credit-offset-std 0.5 --records "$out/level.jsonl" >"$out/level.json"

echo "3. DPO on the segments that agree with their response"
pivotal dpo "${common[@]}" "${short[@]}" --signals "$out/level.jsonl" --credit-signal level \
    --credit-baseline batch_mean --credit-offset-std 0.5 --out "$out/dpo-level" >"$out/dpo-level.json"

echo "4. an oracle: DPO on every token of the same pairs"
pivotal dpo "${common[@]}" "${short[@]}" --credit-selection all --out "$out/oracle" >"$out/oracle.json"

echo "5. its log-ratio to the model it started from as the signal"
pivotal annotate "${common[@]}" --signal log_ratio --oracle "$out/oracle" "${band[@]}" \
    --records "$out/log_ratio.jsonl" >"$out/log_ratio.json"

echo "6. DPO on the segments that agree with their response"
pivotal dpo "${common[@]}" "${short[@]}" --signals "$out/log_ratio.jsonl" "${band[@]}" \
    --out "$out/dpo-log-ratio" >"$out/dpo-log-ratio.json"

echo "7. what the adapted model says"
pivotal generate --model "$model" --adapter "$out/dpo-log-ratio" --prompt "Name the capital of France." \
    --max-new-tokens 16
echo "adapters in peft's format: $out/dpo-level/adapter and $out/dpo-log-ratio/adapter"
