# DATA: a directory with token shards in train/ and val/.
cs336 leaderboard run short-time --recipe recipe.toml --data DATA --directory again
