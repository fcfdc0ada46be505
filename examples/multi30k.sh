#!/bin/sh
# Multi30k German to English, everything on CPU: teacher, distillation, students, table.
#
#   examples/multi30k.sh CORPUS OUTPUT
#
# CORPUS holds train, val and test_2016_flickr as .de.gz and .en.gz. Steps that are done are not done
# again, so a killed run goes on where it was. The results in docs/results/multi30k.md come from it,
# but for FlowSeq's, which had the teacher trained on (ar-more) to begin with, to distil and to choose.
set -eu
corpus=$1
out=$2
pynar=${PYNAR:-pynar}
mkdir -p "$out"

[ -e "$out/data" ] || $pynar prepare --output "$out/data" --vocab-size 6000 --model-type bpe \
  --train "$corpus/train.de.gz" "$corpus/train.en.gz" --valid "$corpus/val.de.gz" "$corpus/val.en.gz"

$pynar train --recipe multi30k_ar --data "$out/data" --output "$out/ar"

[ -e "$out/data-distilled" ] || $pynar distill --teacher "$out/ar/best" --data "$out/data" \
  --output "$out/data-distilled" --beam 5

# Every student begins with the teacher's weights where names and shapes agree.
train() {
  recipe=$1 data=$2 run=$3
  shift 3
  $pynar train --recipe "multi30k_$recipe" --data "$data" --output "$run" \
    --init-from "$out/ar/best" "$@"
}
train cmlm "$out/data-distilled" "$out/cmlm"
train nat "$out/data" "$out/nat-raw"
train nat "$out/data-distilled" "$out/nat"
train flowseq "$out/data" "$out/flowseq-raw"
train flowseq "$out/data-distilled" "$out/flowseq"
# JANUS, and what it is compared with, on real text: a CMLM, and the teacher trained on for as many
# updates, which shows what these alone would give.
train cmlm "$out/data" "$out/cmlm-raw" --set training.max_updates=2400
train janus "$out/data" "$out/janus-raw"
train ar "$out/data" "$out/ar-more" --set training.max_updates=2400 --set training.lr=1e-3 \
  --set training.warmup_updates=200

# Candidates and prior of the length were chosen on the validation set.
length=length_candidates=5,length_prior=0.5
$pynar evaluate --source "$corpus/test_2016_flickr.de.gz" \
  --reference "$corpus/test_2016_flickr.en.gz" --json "$out/results.json" --model "$out/ar/best" \
  "$out/cmlm/best:iterations=1,$length" "$out/cmlm/best:iterations=4,$length" \
  "$out/cmlm/best:iterations=10,$length" "$out/nat-raw/best:iterations=1,$length" \
  "$out/nat/best:iterations=1,$length"

janus=$out/janus-raw/best parallel=strategy=mask_predict,$length
$pynar evaluate --source "$corpus/test_2016_flickr.de.gz" \
  --reference "$corpus/test_2016_flickr.en.gz" --json "$out/janus.json" --plot "$out/janus.png" \
  --model "$out/ar/best" "$out/ar-more/best" "$out/cmlm-raw/best:iterations=1,$length" \
  "$out/cmlm-raw/best:iterations=4,$length" "$out/cmlm-raw/best:iterations=10,$length" \
  "$janus:strategy=greedy" "$janus:strategy=beam" "$janus:strategy=draft_and_verify" \
  "$janus:$parallel,iterations=1" "$janus:$parallel,iterations=4" "$janus:$parallel,iterations=10"

# FlowSeq; drafts are chosen by the teacher (NPD) or by the model itself (IWD).
drafts=length_candidates=3,temperature=1
npd=strategy=npd,rescorer=$out/ar/best,$drafts
$pynar evaluate --source "$corpus/test_2016_flickr.de.gz" \
  --reference "$corpus/test_2016_flickr.en.gz" --json "$out/flowseq.json" --model "$out/ar/best" \
  "$out/flowseq-raw/best" "$out/flowseq-raw/best:$npd,samples=10" "$out/flowseq/best" \
  "$out/flowseq/best:strategy=iwd,samples=5,$drafts" "$out/flowseq/best:$npd,samples=5" \
  "$out/flowseq/best:$npd,samples=10"
