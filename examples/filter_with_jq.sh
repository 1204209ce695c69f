#!/usr/bin/env bash
# Keep the boxes the model was sure of, as a COCO file. Needs jq.
#   examples/filter_with_jq.sh RECORDS.jsonl OUT.json [SCORE]
set -euo pipefail
records=$1 out=$2 score=${3:-0.5}

# A picture without a sure box stays, as a picture without objects.
jq -c --argjson least "$score" 'if .objects then .objects |= map(select(.score >= $least)) else . end' "$records" >"$out.jsonl"
md3 export "$out.jsonl" --format coco -o "$out" --overwrite

jq -r '.annotations | length | "\(.) boxes"' "$out"
