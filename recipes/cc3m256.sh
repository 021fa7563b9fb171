#!/usr/bin/env bash
# CC3M at 256 px on several GPUs, evaluated on COCO, which it has not seen: FID on 30,000 prompts and CIDEr on Karpathy's test
# split. Not run yet: no such machine was at hand. DRY_RUN=1 tries everything but the size; docs/training.md has memory, hours
# and the papers' numbers.
#
#   1. Fetch Train_GCC-training.tsv (ai.google.com/research/ConceptualCaptions), put a line "caption<TAB>url" before it, and
#      download the images into shards of 10,000, about 65 GB:
#         pip install img2dataset
#         img2dataset --url_list Train_GCC-training.tsv --input_format tsv --url_col url --caption_col caption \
#             --output_format webdataset --image_size 256 --resize_mode no --output_folder cc3m
#      Name the shards cc3m/train-00000.tar and so on, and the last one cc3m/val-00000.tar.
#   2. Put COCO into coco/, as the head of coco256.sh says.
#   3. .venv/bin/python install.py eval,data
#   4. DATA=cc3m COCO=coco TEACHER=networks/squeezenet_layers.pt bash recipes/cc3m256.sh
#
# The variables are those of coco256.sh.
NAME=cc3m256
if [ -z "${DRY_RUN:-}" ] && [ -n "${DATA:-}" ]; then
    [ -n "${COCO:-}" ] || { echo "error: nothing to measure on; set COCO to the folder of COCO" >&2; exit 2; }
    EVAL_DATA=$COCO/dataset_coco.json
    T2I_DATA=$COCO/annotations/captions_val2014.json T2I_SPLIT=val T2I_FLAGS="--limit 30000 --seeds 1"
fi
source "$(dirname "$0")/256px.sh"
