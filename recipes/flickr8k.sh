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
set -eo pipefail # no -u: empty arrays are errors in bash 3.2, which macOS has
cd "$(dirname "$0")/.."

PRESET=${PRESET:-flickr8k}
ALIGN=${ALIGN:-ot}
START=${START:-}
RUN=${RUN:-runs/$PRESET-$ALIGN${START:+-further}}
DATA=${DATA:-$([ "$PRESET" = tiny ] && echo shapes || echo "${TAVQ_DATA:-}")}
[ -n "$DATA" ] || { echo "error: no dataset is named; set DATA=DIR or TAVQ_DATA" >&2; exit 2; }
SPLIT=${SPLIT:-test}
DEVICE=${DEVICE:-cpu}
TEACHER=${TEACHER:-}
FEATURES=${FEATURES:-}
JUDGE=${JUDGE:-}
PYTHON=${PYTHON:-.venv/bin/python}
SELF_CRITICAL=$([ "$PRESET" = tiny ] && echo tiny-self-critical || echo flickr8k-self-critical)
EVAL_FLAGS=$([ "$PRESET" = tiny ] && echo "--limit 60" || true)
READY=$RUN/ready # what is shipped: rounded weights, and what was measured with them

tavq() { "$PYTHON" -m tavq "$@"; }

step() { # NAME COMMAND...: run once; a mark is left behind when it ends well
    local mark=$RUN/done/$1
    if [ -e "$mark" ]; then echo "== $1: done before"; return; fi
    echo "== $1"
    "${@:2}"
    mkdir -p "$RUN/done" && touch "$mark"
}

train() { # NAME FLAGS...
    local large=()
    if [ "$DEVICE" = cuda ] && [ "$PRESET" != tiny ]; then
        large=(--training.precision bf16 --training.num-workers 8 --training.batch-size 128)
        case $* in
        *self-critical*) large+=(--training.steps 200) ;;
        tokenizer*) large+=(--training.steps 8000 --training.evaluate-every 1000) ;;
        decoder*) large+=(--training.steps 6000) ;;
        *) large+=(--training.steps 2500 --training.evaluate-every 250 --training.patience 3) ;;
        esac
    fi
    tavq train "$1" "${@:2}" "${large[@]}"
}

teacher=()
[ -n "$TEACHER" ] && teacher=(--perceptual "$TEACHER" --distill "$TEACHER")
tokenizer_start=() generator_start=() captioner_start=()
if [ -n "$START" ]; then # lower rates: what has been learnt stays; two of three steps teach the encoder alone
    tokenizer_start=(--start "$START/tokenizer" --training.learning-rate 8e-4 --losses.decode-every 3)
    tokenizer_start+=(--losses.align 0.4 --losses.distill 0.3)
    generator_start=(--start "$START/generator" --training.learning-rate 1e-3)
    captioner_start=(--start "$START/captioner" --training.learning-rate 1e-3)
fi
features=()
[ -n "$FEATURES" ] && features=(--features "$FEATURES")
judge=()
[ -n "$JUDGE" ] && judge=(--judge "$JUDGE")
evaluate() { # NAME FLAGS...
    tavq eval "$1" --publish --checkpoint "$READY" --data "$DATA" --split "$SPLIT" --device "$DEVICE" \
        --label "$PRESET-$ALIGN" $EVAL_FLAGS "${@:2}"
}

step tokenizer train tokenizer --preset "$PRESET" --align "$ALIGN" --data "$DATA" --out "$RUN/tokenizer" "${teacher[@]}" \
    "${tokenizer_start[@]}"
case $ALIGN in
ot | gaussian) TRAINED=$RUN/tokenizer ;;
*) # codes that transport did not draw to text learn to be read as text afterwards, for the table's retrieval
    TRAINED=$RUN/probed
    step probe tavq align --base "tavq:$RUN/tokenizer" --probe-only --data "$DATA" --out "$TRAINED"
    ;;
esac
more_images=()
[ -n "${MORE_IMAGES:-}" ] && more_images=(--images "$MORE_IMAGES")
step decoder train decoder --preset "$PRESET" --tokenizer "$TRAINED" --data "$DATA" --out "$RUN/decoder" \
    ${TEACHER:+--perceptual "$TEACHER"} "${more_images[@]}"
step tokenizer-export tavq export "$RUN/decoder" --out "$READY/tokenizer"
step tokens tavq tokenize --data "$DATA" --checkpoint "$READY/tokenizer" --out "$RUN/tokens" --device "$DEVICE"
step generator train generator --preset "$PRESET" --tokens "$RUN/tokens" --tokenizer "$READY/tokenizer" --out "$RUN/generator" \
    "${generator_start[@]}"
step generator-export tavq export "$RUN/generator" --out "$READY/generator"
step captioner train captioner --preset "$PRESET" --tokens "$RUN/tokens" --tokenizer "$READY/tokenizer" --out "$RUN/captioner" \
    "${captioner_start[@]}"
step self-critical train captioner --preset "$SELF_CRITICAL" --tokens "$RUN/tokens" --start "$RUN/captioner" --out "$RUN/self-critical"
step captioner-export tavq export "$RUN/self-critical" --out "$READY/captioner"
if [ -n "$FEATURES" ]; then
    step measure-tokenizer evaluate tokenizer "${features[@]}"
    step measure-t2i evaluate t2i "${features[@]}" "${judge[@]}"
else
    echo "== no FEATURES network: rFD and FD are left out"
    step measure-tokenizer evaluate tokenizer --no-frechet
fi
step measure-captions evaluate caption
echo "weights and results: $READY"
