"""Where things lie below the root of a store."""

MANIFEST = "manifest.json"
INDEX = "index.json"
COMMITS = "commits"


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}"


def commit_path(shard: int) -> str:
    return f"{COMMITS}/{shard_name(shard)}.json"


def stream_path(stream: str, shard: int) -> str:
    return f"{stream}/{shard_name(shard)}.tar"
