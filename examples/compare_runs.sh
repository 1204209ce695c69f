#!/usr/bin/env bash
# What changes when a setting changes: two runs over the same pictures, compared request by request.
#   examples/compare_runs.sh [FOLDER]
set -euo pipefail
here=$(dirname "$0")
out=${1:-compared}

md3 query "$here/images" -q "How many objects are there?" --model tiny --dtype fp32 -o "$out/fp32.jsonl"
md3 query "$here/images" -q "How many objects are there?" --model tiny --dtype bf16 -o "$out/bf16.jsonl"

md3 eval "$out/bf16.jsonl" --compare "$out/fp32.jsonl"
# The same as JSON: the pictures whose answer changed.
md3 eval "$out/bf16.jsonl" --compare "$out/fp32.jsonl" --json |
  python -c 'import json, sys; [print(c["image"], c["before"], "->", c["after"]) for c in json.load(sys.stdin)["comparison"]["changes"]]'
