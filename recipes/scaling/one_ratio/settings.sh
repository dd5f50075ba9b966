# Of recipes/scaling/ladder.sh: a ladder of one ratio on one H200, whose forecast is in forecasts.jsonl beside this file.
# To make the run that was forecast, with two seeds, and grade it (TOKENS: public-domain books, vocabulary 512):
#
#   . recipes/scaling/one_ratio/settings.sh && mkdir -p DIRECTORY && cp recipes/scaling/one_ratio/forecasts.jsonl DIRECTORY
#   recipes/scaling/ladder.sh TOKENS DIRECTORY grade
export BASE=recipes/scaling/ladder_gpu.toml FIT="--law compute" SWEEP="--workers 15 --gpus 0" TARGET=10x
SHAPE="--vocab-size 512 --context-length 256 --head-dim 32 --num-layers 3 --d-ff-multiple 32 --batch-factor 1.25"
export SHAPE="$SHAPE --lr-factor 0.3 --highest-lr 0.03"
export DESIGN="ladder --sizes 9.9e5 6.7e5 3.8e5 1.75e5 --ratios 20 --seeds 3"
export RUN="ladder --sizes 3.13e6 --ratios 21.8 --seeds 2"
