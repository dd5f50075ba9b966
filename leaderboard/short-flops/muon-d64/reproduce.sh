# DATA: a directory with token shards in train/ and val/.
cs336 leaderboard run short-flops --recipe recipe.toml --data DATA --directory again
