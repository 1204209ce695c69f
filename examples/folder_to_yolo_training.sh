#!/usr/bin/env bash
# A folder of pictures to a detector of your own: named labels, a run, a data set in two parts, an epoch, its mAP.
# Needs Ultralytics: pip install -c constraints.txt ultralytics
#   [EPOCHS=1] examples/folder_to_yolo_training.sh [PICTURES] [FOLDER]
set -euo pipefail
here=$(dirname "$0")
pictures=${1:-$here/scenes}
mkdir -p "${2:-training}"
out=$(cd "${2:-training}" && pwd) # Ultralytics looks for a relative path in folders of its own

# What to look for, and what it is called: several prompts may share a name, a label may have a threshold. Yours stay.
[ -e "$out/labels.toml" ] || cat >"$out/labels.toml" <<'LABELS'
[[label]]
name = "round"
prompts = ["circle", "moon"]
min_score = 0.3

[[label]]
name = "star"

[[label]]
name = "square"
LABELS

md3 detect "$pictures" --labels "$out/labels.toml" --model tiny -o "$out/run" --fail-on none

# A picture stays in its part whatever is added to the folder. With --link the pictures are not copied.
md3 export "$out/run" --format yolo --split train=0.8,val=0.2 -o "$out/dataset" --overwrite

# From nothing and once over the pictures, to see that it works; its mAP is 0 then. 30 epochs over 120 scenes of
# shapes.py, at 160 pixels, came to a mAP50 of 0.27 in 7 minutes of one core. To train in earnest take model=yolo11n.pt,
# which is downloaded. The truth is what md3 found: `md3 report` and --min-score help to choose what is learnt from.
yolo detect train data="$out/dataset/data.yaml" model=yolo11n.yaml epochs="${EPOCHS:-1}" imgsz=320 batch=4 \
  amp=False plots=False project="$out" name=detector exist_ok=True

# results.csv has a row for each epoch.
python - "$out/detector/results.csv" <<'PRINT'
import csv, sys

with open(sys.argv[1], encoding="utf-8") as file:
    last = [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(file)][-1]
print(f"mAP50 {float(last['metrics/mAP50(B)']):.3f}, mAP50-95 {float(last['metrics/mAP50-95(B)']):.3f}")
PRINT
