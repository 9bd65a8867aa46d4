"""The JSON Schema of a store's files changes on purpose only."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

from schemas.json_schema import SCHEMA_FILE, schema_text, store_schema
from schemas.store import STORE_VERSION

DIGESTS = {2: "05c6b95e6db5b371154eb0b00022258c4bddb762abd673459af6f3e52578c2cc"}
"""Of the schema of each version, without its prose."""

ADVICE = """
What stands in a store has changed. Can this software still read the stores that it wrote before,
and can the one before read the new ones? If not, raise STORE_VERSION in schemas/store.py. Then run
`make schema` (python -m schemas.json_schema), commit schemas/store.schema.json, and put this digest
into DIGESTS of this test: {digest}
"""


def without_prose(schema: Any) -> Any:
    if isinstance(schema, dict):
        prose = {"description", "title"}
        # a property may be called so: only texts are prose
        kept = {k: v for k, v in schema.items() if not (k in prose and isinstance(v, str))}
        return {key: without_prose(value) for key, value in kept.items()}
    return [without_prose(item) for item in schema] if isinstance(schema, list) else schema


def digest(schema: Any) -> str:
    return hashlib.sha256(json.dumps(without_prose(schema), sort_keys=True).encode()).hexdigest()


def test_the_published_schema_is_that_of_the_models() -> None:
    found = SCHEMA_FILE.read_text() if SCHEMA_FILE.exists() else ""
    assert found == schema_text(), ADVICE.format(digest=digest(store_schema()))


def test_a_version_means_one_schema() -> None:
    found = digest(store_schema())
    assert DIGESTS.get(STORE_VERSION) == found, ADVICE.format(digest=found)


def test_a_changed_default_or_bound_is_a_change_and_prose_is_not() -> None:
    schema = store_schema()
    before = digest(schema)
    schema["manifest"]["properties"]["shard_size"]["description"] = "other words"
    assert digest(schema) == before
    schema["manifest"]["properties"]["shard_size"]["minimum"] = 2
    assert digest(schema) != before


def test_publishing_needs_neither_torch_nor_ray() -> None:
    program = "import sys, schemas.json_schema; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
