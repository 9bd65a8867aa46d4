"""Ray clusters, actors and their logs; process groups; signals."""
