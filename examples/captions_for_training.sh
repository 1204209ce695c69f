#!/usr/bin/env bash
# Long captions of a folder, in the two shapes that trainers of image models take.
#   examples/captions_for_training.sh [FOLDER]
set -euo pipefail
here=$(dirname "$0")
out=${1:-captions}

md3 caption "$here/images" --length long --model tiny -o "$out/captions.jsonl" --fail-on none

# One photo.txt for each photo.jpg. With --beside, instead of -o, they stand next to the pictures.
md3 export "$out/captions.jsonl" --format txt -o "$out/sidecars" --overwrite

# Pictures and captions as a data set: load_dataset("imagefolder", data_dir="…/imagefolder")["train"]["text"]
md3 export "$out/captions.jsonl" --format hf -o "$out/imagefolder" --overwrite
