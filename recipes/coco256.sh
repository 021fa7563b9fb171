#!/usr/bin/env bash
# COCO at 256 px on several GPUs, evaluated with FID on 30,000 prompts and CIDEr on Karpathy's test split. Not run yet: no such
# machine was at hand. DRY_RUN=1 tries everything but the size; docs/training.md has memory, hours and the papers' numbers.
#
#   1. Fetch train2014.zip, val2014.zip and annotations_trainval2014.zip (cocodataset.org) and Karpathy's dataset_coco.json
#      (caption_datasets.zip), and unpack them into coco/: train2014/, val2014/, annotations/, dataset_coco.json.
#   2. .venv/bin/python install.py eval,data
#   3. DATA=coco TEACHER=networks/squeezenet_layers.pt bash recipes/coco256.sh
#
# Every step is skipped when it is done and goes on where it was stopped. GPUS=4 plans for four processes; the number that is
# started stands in ACCELERATE (configs/accelerate/ddp.yaml). VLM="--model NAME --endpoint URL" has the training images described
# at length first (tavq describe), which the alignment reads. chain.sh names all variables.
NAME=coco256
if [ -z "${DRY_RUN:-}" ] && [ -n "${DATA:-}" ]; then
    # Trained on train2014 alone: prompts and captions that are measured come from val2014, of which Karpathy's split trains on
    # three quarters.
    "${PYTHON:-$(dirname "$0")/../.venv/bin/python}" "$(dirname "$0")/coco_train2014.py" "$DATA"
    EVAL_DATA=$DATA/dataset_coco_train2014.json
    T2I_DATA=$DATA/annotations/captions_val2014.json T2I_SPLIT=val T2I_FLAGS="--limit 30000 --seeds 1"
    VLM=${VLM:+$VLM --out $DATA/long_text.jsonl} # where training finds them
    DATA=$EVAL_DATA
fi
source "$(dirname "$0")/256px.sh"
