#!/usr/bin/env bash
# A folder of pictures to a COCO file that training tools load, and the same boxes drawn on the pictures.
#   examples/folder_to_coco.sh [FOLDER]
set -euo pipefail
here=$(dirname "$0")
out=${1:-boxes}

md3 detect "$here/images" "red circle" face --model tiny -o "$out/coco.json"

# The records beside it are the truth: every other format is made from them, without the model.
md3 export "$out/coco.json.records.jsonl" --format overlay -o "$out/overlays" --overwrite
md3 export "$out/coco.json.records.jsonl" --format yolo -o "$out/yolo" --overwrite # yolo train data=…/yolo/data.yaml
