#!/usr/bin/env bash
# Score a run against ground truth, see the curves, and look at what is wrong.
#   examples/score.sh [FOLDER]
set -euo pipefail
here=$(dirname "$0")
out=${1:-scores}

python "$here/shapes.py" --seed 7 --count 24 --out "$out/scenes" # pictures and their ground truth
md3 detect "$out/scenes" circle square triangle --model tiny -o "$out/boxes.jsonl"

md3 eval "$out/boxes.jsonl" --gt "$out/scenes/instances.json" -o "$out/eval" # tables here, curves as PNG there
md3 report "$out/boxes.jsonl" --gt "$out/scenes/instances.json" -o "$out/report.html"
# Open report.html, choose "wrong" under "By ground truth": dashed white is what was missed.

# In a pipeline: the exit status is 1 where the run is worse than it may be.
if ! md3 eval "$out/boxes.jsonl" --gt "$out/scenes/instances.json" --fail-under AP50=0.5 >/dev/null; then
  echo "this run would stop the pipeline"
fi
