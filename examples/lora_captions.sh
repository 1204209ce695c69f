#!/usr/bin/env bash
# Captions with a trigger word for training a LoRA, laid out for kohya's sd-scripts, OneTrainer and diffusers.
#   MD3_MODEL=moondream3 examples/lora_captions.sh [PICTURES [WORD [CLASS [FOLDER]]]]
set -euo pipefail
here=$(dirname "$0")
pictures=${1:-$here/images} word=${2:-sks} class=${3:-picture} out=${4:-lora} repeats=10

# Both trainers read the pictures right inside a folder, and each one's text by its name without suffix. So they get
# copies in one folder, and the suffix goes into the name: a.jpg and a.png would share a text.
kohya="$out/kohya/${repeats}_$word $class" onetrainer="$out/onetrainer/$word"
mkdir -p "$kohya" "$onetrainer"
find "$pictures" -type f \( -iname '*.jpg' -o -iname '*.jpeg' -o -iname '*.png' -o -iname '*.webp' \) -print0 |
  while IFS= read -r -d '' picture; do
    name=${picture#"$pictures"/} suffix=${picture##*.}
    name=${name//\//_}
    cp "$picture" "$kohya/${name%.*}-$suffix.$suffix"
    cp "$picture" "$onetrainer/${name%.*}-$suffix.$suffix"
  done

md3 caption "$kohya" --length long --model "${MD3_MODEL:-tiny}" -o "$out/captions.jsonl" --fail-on none

# One line a picture, beside it; made anew each time. Where you have captions already: --existing append (or prepend).
write() { md3 export "$out/captions.jsonl" --format txt --beside --existing replace --prefix "$word, " "$@"; }
write --extension .caption                  # kohya: train_network.py --train_data_dir FOLDER/kohya
write --root "$onetrainer"                  # OneTrainer: a concept with this folder, prompts from a file per picture

# Pictures and captions as a data set: load_dataset("imagefolder", data_dir="FOLDER/imagefolder")["train"]["text"]
md3 export "$out/captions.jsonl" --format hf -o "$out/imagefolder" --overwrite
