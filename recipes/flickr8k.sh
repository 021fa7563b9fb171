#!/usr/bin/env bash
# Train tokenizer, generator and captioner, and measure them; `tavq table` makes the README's tables of the results:
#
#   DATA=data/flickr8k TEACHER=squeezenet_layers.pt FEATURES=mobilenet_v2_features.pt bash recipes/flickr8k.sh
#   PRESET=tiny bash recipes/flickr8k.sh        # the same chain on generated shapes, in minutes
#   START=checkpoints/flickr8k DATA=... bash recipes/flickr8k.sh   # train finished weights further, as the shipped ones were
#
# Every step is skipped when it is done and goes on where it was stopped. ALIGN=none trains the plain baseline.
# TEACHER shapes the tokenizer (perceptual loss and distillation), FEATURES only measures; JUDGE, another checkpoint,
# captions the generated pictures where there are FEATURES. Training takes a GPU where there is one; DEVICE=cuda evaluates
# on it too, and trains in bf16 with large batches, on a million images for the tokenizer (not run yet: no GPU was at hand).
# MORE_IMAGES=DIR adds images that need no captions; PREFERENCE_PRESET=flickr8k-preference tunes the generator by preferences.
# chain.sh holds the steps and names all variables.
set -eo pipefail # no -u: empty arrays are errors in bash 3.2, which macOS has
cd "$(dirname "$0")/.."

FLAGS_TOKENIZER=() FLAGS_DECODER=() FLAGS_GENERATOR=() FLAGS_CAPTIONER=() FLAGS_SELF_CRITICAL=()
if [ -n "${START:-}" ]; then # lower rates: what has been learnt stays; two of three steps teach the encoder alone
    FLAGS_TOKENIZER=(--start "$START/tokenizer" --training.learning-rate 8e-4 --losses.decode-every 3)
    FLAGS_TOKENIZER+=(--losses.align 0.4 --losses.distill 0.3)
    FLAGS_GENERATOR=(--start "$START/generator" --training.learning-rate 1e-3)
    FLAGS_CAPTIONER=(--start "$START/captioner" --training.learning-rate 1e-3)
fi
if [ "${DEVICE:-cpu}" = cuda ] && [ "${PRESET:-flickr8k}" != tiny ]; then
    large=(--training.precision bf16 --training.num-workers 8 --training.batch-size 128)
    patient=(--training.steps 2500 --training.evaluate-every 250 --training.patience 3)
    FLAGS_TOKENIZER+=("${large[@]}" --training.steps 8000 --training.evaluate-every 1000)
    FLAGS_DECODER+=("${large[@]}" --training.steps 6000)
    FLAGS_GENERATOR+=("${large[@]}" "${patient[@]}")
    FLAGS_CAPTIONER+=("${large[@]}" "${patient[@]}")
    FLAGS_SELF_CRITICAL+=("${large[@]}" --training.steps 200)
fi
source recipes/chain.sh
