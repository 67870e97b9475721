#!/usr/bin/env bash
# From nothing to a model that answers questions about pictures it has not seen, on two processes, in minutes, without a GPU:
#
#   bash examples/quickstart.sh [--fresh] [key=value ...]
#
# Settings go to both training phases (train.steps=50 for a quick look). A second call reuses the data and what is trained already;
# --fresh starts over. RUN=FOLDER puts everything elsewhere than runs/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RUN=${RUN:-runs/quickstart}
fresh=false settings=()
for argument in "$@"; do
  case $argument in
    --fresh) fresh=true ;;
    *=*) settings+=("$argument") ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0"; exit 0 ;;
    *) echo "$0: $argument is neither --fresh nor key=value" >&2; exit 2 ;;
  esac
done

say() { printf '\n\033[1m[%d:%02d] %s\033[0m\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
ranks() { OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m "$@"; }
newest() { echo "$RUN/$1/checkpoints/$(<"$RUN/$1/checkpoints/latest")"; }
evaluate() { # NAME, then what says which model; two data-parallel processes whatever the layout it was trained in
  local name=$1
  shift
  ranks llava_mcore.evaluation.exact_match --data "$RUN/shards/heldout" --max-new-tokens 8 --output "$RUN/eval-$name.json" \
    "$@" parallel.tensor=1 parallel.pipeline=1
}

say "1/8 Install"
source tools/install.sh # leaves the Python with everything installed in $PYTHON
if [[ $fresh == true ]]; then rm -rf "${RUN:?}"/{data,shards,phase1,phase2,huggingface,*.json,*.png,*.txt}; fi
mkdir -p "$RUN"

say "2/8 Data: scanned digits and two photographs, as conversations, as shards"
data=(data.path="$RUN/shards/train" data.tokenizer="$RUN/data/tokenizer")
if [[ -d $RUN/shards/train && -d $RUN/shards/heldout ]]; then
  echo "reused: $RUN/shards"
else
  "$PYTHON" examples/quickstart/make_data.py "$RUN/data"
  for part in train heldout; do
    "$PYTHON" tools/prepare_data.py shard --input "$RUN/data/$part.json" --media "$RUN/data/media" --output "$RUN/shards/$part" --overwrite
  done
fi
"$PYTHON" tools/prepare_data.py index "$RUN/shards/train" --tokenizer "$RUN/data/tokenizer" --template vicuna_v1

say "3/8 Held-out questions to the untrained model"
evaluate untrained --untrained experiment=quickstart "${data[@]}"

say "4/8 Phase 1: everything learns, tensor parallel on 2 processes"
ranks llava_mcore.train experiment=quickstart parallel=tp2 train.output_dir="$RUN/phase1" train.log_every=10 "${data[@]}" "${settings[@]}"
evaluate phase1 --checkpoint "$(newest phase1)"

say "5/8 Phase 2: the tower stays frozen, and the same weights are now two pipeline stages"
ranks llava_mcore.train experiment=quickstart_finetune parallel=pp2 train.output_dir="$RUN/phase2" train.log_every=10 \
  train.init_from="$(newest phase1)" "${data[@]}" "${settings[@]}"

say "6/8 Held-out questions to the trained model"
evaluate phase2 --checkpoint "$(newest phase2)"

say "7/8 Export to Hugging Face, and the same questions through transformers"
"$PYTHON" tools/convert_checkpoint.py export "$(newest phase2)" "$RUN/huggingface" --overwrite
"$PYTHON" examples/quickstart/compare_transformers.py "$RUN/huggingface" "$RUN/shards/heldout" "$RUN/eval-phase2.json" \
  --output "$RUN/transformers.json"

say "8/8 What came out"
"$PYTHON" examples/quickstart/report.py "$RUN" --seconds "$SECONDS"
