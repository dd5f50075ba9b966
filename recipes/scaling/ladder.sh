#!/bin/sh
# A ladder of tiny models, the forecast of a run of ten times the compute of its largest, that run, and its grade.
#
#   recipes/scaling/ladder.sh TOKENS DIRECTORY forecast    # then keep DIRECTORY/forecasts.jsonl where it is not changed
#   recipes/scaling/ladder.sh TOKENS DIRECTORY grade
#
# TOKENS: token shards in train/ and val/, such as those of `cs336 quickstart`. Either command goes on where it was
# stopped. BUDGETS, TARGET (FLOPs a run), SIZES, SHAPE and BASE may be set; as they are the ladder takes 1.9e12 FLOPs.
# DESIGN="ladder --sizes 1e5 3e5 1e6 3e6 --ratios 20 --seeds 3" is the ladder in place of IsoFLOP profiles;
# FIT="--law compute" goes to the fit; RUN="ladder --sizes 1e7 --ratios 20 --seeds 2" is the run that is forecast, in
# place of the law's best of TARGET FLOPs, and TARGET is then its name.
# SWEEP="--workers 10 --gpus 0" trains ten rungs at once on one GPU, which tiny models leave idle.
set -eu
tokens=$1 directory=$2 stage=$3
budgets=${BUDGETS:-5e10 1.5e11 4.5e11} target=${TARGET:-4.5e12}
shape=${SHAPE:---head-dim 8 --lr-factor 0.5 --highest-lr 0.01 --batch-factor 2}
sizes=${SIZES:---points 5 --span 2.2 --ratio 10} base=${BASE:-$(dirname "$0")/ladder.toml}
mkdir -p "$directory"
design() { cs336 scaling design "$@" --data "$tokens" --base "$base" $shape; }

if [ ! -e "$directory/ladder.toml" ]; then
    design ${DESIGN:-isoflop --budgets $budgets $sizes} \
        --directory "$directory/ladder" --write "$directory/ladder.toml"
fi
case $stage in
forecast)
    cs336 sweep "$directory/ladder.toml" ${SWEEP:-}
    cs336 scaling fit "$directory/ladder" ${FIT:-} --out "$directory/law.json"
    design ${RUN:-best --law "$directory/law.json" --budgets $target} \
        --directory "$directory/target" --write "$directory/target.toml"
    cs336 scaling forecast "$directory/law.json" --name "$target" --study "$directory/target.toml" \
        --log "$directory/forecasts.jsonl"
    ;;
grade)
    if [ ! -e "$directory/target.toml" ]; then # of a forecast that was brought here
        design $RUN --directory "$directory/target" --write "$directory/target.toml"
    fi
    cs336 sweep "$directory/target.toml" ${SWEEP:-}
    cs336 scaling grade "$target" --study "$directory/target" --log "$directory/forecasts.jsonl"
    ;;
*)
    echo "the third word is forecast or grade, got $stage" >&2
    exit 2
    ;;
esac
