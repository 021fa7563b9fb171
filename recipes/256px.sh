# What coco256.sh and cc3m256.sh share: the presets, the accelerate configuration and the trial. Read with `source`.
#
#   DRY_RUN=1 bash recipes/coco256.sh   # builds every model without values, estimates memory and hours, and runs ten steps of
#                                       # a shrunken copy of the whole chain on generated shapes, here
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
GPUS=${GPUS:-8}
if [ -n "${DRY_RUN:-}" ]; then
    "$PYTHON" recipes/plan.py "$NAME" --gpus "$GPUS"
    unset ACCELERATE VLM FEATURES TEACHER START
    PRESET=tiny STEPS=10 DATA=shapes:64 RUN=${RUN:-runs/$NAME-dry-run}
    source recipes/chain.sh
    exit
fi

[ -n "${DATA:-}" ] || { echo "error: no dataset is named; set DATA as the head of recipes/$NAME.sh says" >&2; exit 2; }
TOKENIZER_PRESET=vqgan256 DECODER_PRESET='' LEXICON_PRESET='' GENERATOR_PRESET=base CAPTIONER_PRESET=base
ACCELERATE=${ACCELERATE-configs/accelerate/ddp.yaml} # fsdp2.yaml for a larger prior, multi_node.yaml for several machines
FEATURES=${FEATURES:-inception}                      # FID itself; its weights are downloaded once
DEVICE=${DEVICE:-cuda}
RUN=${RUN:-runs/$NAME} LABEL=${LABEL:-$NAME}

fast=(--training.precision bf16 --training.num-workers 8)
read -r tokenizer_steps generator_steps captioner_steps < <("$PYTHON" recipes/plan.py "$NAME" --gpus "$GPUS" --steps)
FLAGS_TOKENIZER=("${fast[@]}" --training.steps "$tokenizer_steps" --training.batch-size 16)
FLAGS_GENERATOR=("${fast[@]}" --training.steps "$generator_steps" --training.batch-size 64)
FLAGS_CAPTIONER=("${fast[@]}" --training.steps "$captioner_steps" --training.batch-size 64)
FLAGS_SELF_CRITICAL=("${fast[@]}" --training.batch-size 16)
source recipes/chain.sh
