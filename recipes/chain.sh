# The chain that the recipes share: tokenizer, decoder, tokens, generator, captioner, evaluations. A recipe sets variables and
# reads this file with `source`; what each variable means stands beside its default below. Every step is skipped when it is done,
# and goes on where it was stopped.

PRESET=${PRESET:-flickr8k}                       # of the whole chain, where nothing else is said
TOKENIZER_PRESET=${TOKENIZER_PRESET:-$PRESET}
DECODER_PRESET=${DECODER_PRESET-$PRESET}         # set and empty: the decoder is not trained further
GENERATOR_PRESET=${GENERATOR_PRESET:-$PRESET}
CAPTIONER_PRESET=${CAPTIONER_PRESET:-$PRESET}
SELF_CRITICAL=${SELF_CRITICAL:-$([ "$PRESET" = tiny ] && echo tiny-self-critical || echo flickr8k-self-critical)}
LEXICON_PRESET=${LEXICON_PRESET-$PRESET}         # set and empty: no lexicon is trained
PREFERENCE_PRESET=${PREFERENCE_PRESET:-}         # such as flickr8k-preference: the generator is tuned by preferences
PREFERENCE_PROMPTS=${PREFERENCE_PROMPTS:-1000}
CROPS=${CROPS:-2}                                # of each training image, from which generator and captioner learn
MORE_IMAGES=${MORE_IMAGES:-}                     # folder of images without captions, for tokenizer and decoder
ALIGN=${ALIGN:-ot}
START=${START:-}
RUN=${RUN:-runs/$PRESET-$ALIGN${START:+-further}}
DATA=${DATA:-$([ "$PRESET" = tiny ] && echo shapes || echo "${TAVQ_DATA:-}")}
[ -n "$DATA" ] || { echo "error: no dataset is named; set DATA=DIR or TAVQ_DATA" >&2; exit 2; }
SPLIT=${SPLIT:-test}
EVAL_DATA=${EVAL_DATA:-$DATA}                    # captions and reconstructions are measured on its SPLIT
T2I_DATA=${T2I_DATA:-$EVAL_DATA}                 # generated images on its T2I_SPLIT, one for each image
T2I_SPLIT=${T2I_SPLIT:-$SPLIT}
T2I_FLAGS=${T2I_FLAGS:-}
VLM=${VLM:-}                                     # flags of `tavq describe`: --model NAME --endpoint URL; empty: no descriptions
ACCELERATE=${ACCELERATE:-}                       # configuration of `accelerate launch`, to train in several processes
STEPS=${STEPS:-}                                 # of every training, instead of the preset's
DEVICE=${DEVICE:-cpu}
TEACHER=${TEACHER:-}
FEATURES=${FEATURES:-}                           # `inception`: FID itself
JUDGE=${JUDGE:-}
PYTHON=${PYTHON:-.venv/bin/python}
EVAL_FLAGS=${EVAL_FLAGS:-$([ "$PRESET" = tiny ] && echo "--limit 60" || true)}
LABEL=${LABEL:-$PRESET-$ALIGN}
READY=$RUN/ready                                 # what is shipped: rounded weights, and what was measured with them
declare -a FLAGS_TOKENIZER FLAGS_DECODER FLAGS_GENERATOR FLAGS_CAPTIONER FLAGS_SELF_CRITICAL # of a recipe, for one training each

tavq() { "$PYTHON" -m tavq "$@"; }

step() { # NAME COMMAND...: run once; a mark is left behind when it ends well
    local mark=$RUN/done/$1
    if [ -e "$mark" ]; then echo "== $1: done before"; return; fi
    echo "== $1"
    "${@:2}"
    mkdir -p "$RUN/done" && touch "$mark"
}

train() { # NAME FLAGS...
    local more=()
    [ -n "$STEPS" ] && more=(--training.steps "$STEPS" --training.evaluate-every "$STEPS")
    if [ -n "$ACCELERATE" ]; then
        "$PYTHON" -m accelerate.commands.launch --config_file "$ACCELERATE" -m tavq train "$1" "${@:2}" "${more[@]}"
    else
        tavq train "$1" "${@:2}" "${more[@]}"
    fi
}

more_images=()
[ -n "$MORE_IMAGES" ] && more_images=(--images "$MORE_IMAGES")
teacher=()
[ -n "$TEACHER" ] && teacher=(--perceptual "$TEACHER" --distill "$TEACHER")
features=()
[ -n "$FEATURES" ] && [ "$FEATURES" != inception ] && features=(--features "$FEATURES")
judge=()
[ -n "$JUDGE" ] && judge=(--judge "$JUDGE")
evaluate() { # NAME DATA SPLIT FLAGS...
    # shellcheck disable=SC2086  # EVAL_FLAGS is several words
    tavq eval "$1" --publish --checkpoint "$READY" --data "$2" --split "$3" --device "$DEVICE" --label "$LABEL" \
        $EVAL_FLAGS "${@:4}"
}

if [ -n "$VLM" ]; then
    # shellcheck disable=SC2086  # VLM is several words
    step describe tavq describe --data "$DATA" --split train $VLM
fi
step tokenizer train tokenizer --preset "$TOKENIZER_PRESET" --align "$ALIGN" --data "$DATA" --out "$RUN/tokenizer" \
    "${teacher[@]}" "${more_images[@]}" "${FLAGS_TOKENIZER[@]}"
case $ALIGN in
ot | gaussian) TRAINED=$RUN/tokenizer ;;
*) # codes that transport did not draw to text learn to be read as text afterwards, for the table's retrieval
    TRAINED=$RUN/probed
    step probe tavq align --base "tavq:$RUN/tokenizer" --probe-only --data "$DATA" --out "$TRAINED"
    ;;
esac
decoder() { # TOKENIZER OUT FLAGS...: the decoder alone; ids, and all that reads them, stay
    train decoder --preset "$DECODER_PRESET" --tokenizer "$1" --data "$DATA" --out "$2" \
        ${TEACHER:+--perceptual "$TEACHER"} "${more_images[@]}" "${FLAGS_DECODER[@]}" "${@:3}"
}
if [ -n "$DECODER_PRESET" ]; then
    step decoder decoder "$TRAINED" "$RUN/decoder"
    TRAINED=$RUN/decoder
fi
step tokenizer-export tavq export "$TRAINED" --out "$READY/tokenizer"
step tokens tavq tokenize --data "$DATA" --checkpoint "$READY/tokenizer" --out "$RUN/tokens" --device "$DEVICE" \
    --crops "$CROPS"
step generator train generator --preset "$GENERATOR_PRESET" --tokens "$RUN/tokens" --tokenizer "$READY/tokenizer" \
    --out "$RUN/generator" "${FLAGS_GENERATOR[@]}"
step captioner train captioner --preset "$CAPTIONER_PRESET" --tokens "$RUN/tokens" --tokenizer "$READY/tokenizer" \
    --out "$RUN/captioner" "${FLAGS_CAPTIONER[@]}"
step self-critical train captioner --preset "$SELF_CRITICAL" --tokens "$RUN/tokens" --start "$RUN/captioner" \
    --out "$RUN/self-critical" "${FLAGS_SELF_CRITICAL[@]}"
step captioner-export tavq export "$RUN/self-critical" --out "$READY/captioner"
GENERATOR=$RUN/generator
if [ -n "$PREFERENCE_PRESET" ]; then # captioner and alignment choose among images of the generator as it is
    step untuned-export tavq export "$GENERATOR" --out "$READY/generator"
    step preferences tavq preferences --data "$DATA" --checkpoint "$READY" --out "$RUN/preferences.jsonl" --device "$DEVICE" \
        --prompts "$PREFERENCE_PROMPTS"
    step tuned train generator --preset "$PREFERENCE_PRESET" --start "$GENERATOR" --tokens "$RUN/tokens" \
        --tokenizer "$READY/tokenizer" --preferences "$RUN/preferences.jsonl" --out "$RUN/tuned"
    GENERATOR=$RUN/tuned
fi
step generator-export tavq export "$GENERATOR" --out "$READY/generator"
if [ -n "$LEXICON_PRESET" ]; then
    step lexicon train lexicon --preset "$LEXICON_PRESET" --tokens "$RUN/tokens" --generator "$READY/generator" --out "$RUN/lexicon"
    step lexicon-export tavq export "$RUN/lexicon" --out "$READY/lexicon"
fi
if [ -n "$DECODER_PRESET" ]; then # with what this generator gets wrong among the tokens (RobusTok, arXiv:2509.12474)
    step robust-decoder decoder "$TRAINED" "$RUN/robust-decoder" --generator "$READY/generator"
    step robust-export tavq export "$RUN/robust-decoder" --out "$READY/tokenizer"
fi
if [ -n "$FEATURES" ]; then
    step measure-tokenizer evaluate tokenizer "$EVAL_DATA" "$SPLIT" "${features[@]}"
    # shellcheck disable=SC2086  # T2I_FLAGS is several words
    step measure-t2i evaluate t2i "$T2I_DATA" "$T2I_SPLIT" "${features[@]}" "${judge[@]}" $T2I_FLAGS
else
    echo "== no FEATURES network: rFD and FD are left out"
    step measure-tokenizer evaluate tokenizer "$EVAL_DATA" "$SPLIT" --no-frechet
fi
step measure-captions evaluate caption "$EVAL_DATA" "$SPLIT"
echo "weights and results: $READY"
