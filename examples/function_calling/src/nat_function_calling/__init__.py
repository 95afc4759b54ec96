"""An agent with tools on questions of the Berkeley Function Calling Leaderboard."""
