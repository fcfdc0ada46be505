#!/bin/sh
# Multi30k German to English, everything on CPU: teacher, distillation, students, table.
#
#   examples/multi30k.sh CORPUS OUTPUT
#
# CORPUS holds train, val and test_2016_flickr as .de.gz and .en.gz. Steps that are done are not done
# again, so a killed run goes on where it was. The results in docs/results/multi30k.md come from it.
set -eu
corpus=$1
out=$2
pynar=${PYNAR:-pynar}
mkdir -p "$out"

[ -e "$out/data" ] || $pynar prepare --output "$out/data" --vocab-size 6000 --model-type bpe \
  --train "$corpus/train.de.gz" "$corpus/train.en.gz" --valid "$corpus/val.de.gz" "$corpus/val.en.gz"

$pynar train --recipe multi30k_ar --data "$out/data" --output "$out/ar"
# As many layers, but for one all in the encoder: the fast autoregressive model to be compared with.
$pynar train --recipe multi30k_ar --data "$out/data" --output "$out/ar-6-1" \
  --set model.encoder_layers=6 --set model.decoder_layers=1

[ -e "$out/data-distilled" ] || $pynar distill --teacher "$out/ar/best" --data "$out/data" \
  --output "$out/data-distilled" --beam 5

# Every student begins with the teacher's weights where names and shapes agree.
train() {
  recipe=$1 data=$2 run=$3
  shift 3
  $pynar train --recipe "multi30k_$recipe" --data "$data" --output "$run" \
    --init-from "$out/ar/best" "$@"  # the last --init-from counts
}
train cmlm "$out/data-distilled" "$out/cmlm"
train nat "$out/data" "$out/nat-raw"
train nat "$out/data-distilled" "$out/nat"
# JANUS, and what it is compared with, on real text: a CMLM, and the teacher trained on for as many
# updates, which shows what these alone would give.
train cmlm "$out/data" "$out/cmlm-raw" --set training.max_updates=2400
train janus "$out/data" "$out/janus-raw"
train ar "$out/data" "$out/ar-more" --set training.max_updates=2400 --set training.lr=1e-3 \
  --set training.warmup_updates=200
# AR and NAR alone, with the masks of a CMLM.
train janus "$out/data" "$out/janus-two" --set model.masking=uniform --set model.nar_weight=1 \
  --set model.aux_weight=0 --set model.kl_nar_aux_weight=0 --set model.kl_ar_aux_weight=0
# The paper's ablation, a quarter of the updates each; the recipe's terms first.
ablation() {
  run=$1
  shift
  train janus "$out/data" "$out/ablation-$run" --set training.max_updates=600 \
    training.warmup_updates=100 training.validate_every=300 training.checkpoint_every=600 "$@"
}
ablation recipe
ablation all --set model.kl_ar_nar_weight=1
ablation ar-nar-kl --set model.kl_ar_nar_weight=1 model.kl_nar_aux_weight=0 \
  model.kl_ar_aux_weight=0 model.aux_weight=0
ablation aux --set model.ar_weight=0 model.nar_weight=0 model.kl_nar_aux_weight=0 \
  model.kl_ar_aux_weight=0 model.aux_weight=1
ablation ar-nar --set model.kl_nar_aux_weight=0 model.kl_ar_aux_weight=0 model.aux_weight=0
# FlowSeq, with the teacher trained on: to begin with, to distil and to choose.
[ -e "$out/data-flowseq" ] || $pynar distill --teacher "$out/ar-more/best" --data "$out/data" \
  --output "$out/data-flowseq" --beam 5
for kind in raw distilled; do
  data=$out/data
  [ $kind = raw ] || data=$out/data-flowseq
  train flowseq "$data" "$out/flowseq-$kind" --init-from "$out/ar-more/best"
done

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

two=$out/janus-two/best
judged=$parallel,n_best=5,rescorer=$two
$pynar evaluate --source "$corpus/test_2016_flickr.de.gz" \
  --reference "$corpus/test_2016_flickr.en.gz" --json "$out/janus-two.json" --no-timing \
  --model "$out/ar-more/best" "$out/cmlm-raw/best:iterations=10,$length" \
  "$out/cmlm-raw/best:iterations=10,$length,n_best=5,rescorer=$out/ar-more/best" \
  "$two:strategy=greedy" "$two:strategy=beam" "$two:$parallel,iterations=1" \
  "$two:$parallel,iterations=4" "$two:$parallel,iterations=10" "$two:$judged,iterations=4" \
  "$two:$judged,iterations=10"

# FlowSeq; drafts are chosen by the teacher (NPD) or by the model itself (IWD).
npd=strategy=npd,rescorer=$out/ar-more/best,temperature=1
for kind in raw distilled; do
  flow=$out/flowseq-$kind/best
  iwd=strategy=iwd,length_candidates=3,samples=5,temperature=0.5
  [ $kind = distilled ] || iwd=strategy=iwd,length_candidates=3,samples=5,temperature=1
  $pynar evaluate --source "$corpus/test_2016_flickr.de.gz" \
    --reference "$corpus/test_2016_flickr.en.gz" --json "$out/flowseq-$kind.json" --no-timing \
    --model "$flow" "$flow:$iwd" "$flow:$npd,length_candidates=3,samples=5" \
    "$flow:$npd,length_candidates=3,samples=10" "$flow:$npd,length_candidates=10,samples=1" \
    "$flow:$npd,length_candidates=1,samples=10"
done
