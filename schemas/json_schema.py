"""`python -m schemas.json_schema`: writes the JSON Schema of a store's files, for readers in other
languages and to detect accidental changes of the format."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from schemas.store import STORE_VERSION, CommitRecord, Manifest, StoreIndex

SCHEMA_FILE = Path(__file__).with_name("store.schema.json")


def store_schema() -> dict[str, Any]:
    """The version of the format, and a JSON Schema for each kind of file."""
    models: dict[str, type[BaseModel]] = {
        "manifest": Manifest,
        "commit_record": CommitRecord,
        "index": StoreIndex,
    }
    schemas = {name: model.model_json_schema() for name, model in models.items()}
    return {"store_version": STORE_VERSION, **schemas}


def schema_text() -> str:
    return json.dumps(store_schema(), indent=1, sort_keys=True) + "\n"


def main() -> None:
    ArgumentParser(
        "python -m schemas.json_schema",
        description=f"Write {SCHEMA_FILE.name}, the "
        "JSON Schema of a store's files, beside this module.",
    ).parse_args()
    SCHEMA_FILE.write_text(schema_text())
    print(f"wrote {SCHEMA_FILE}")


if __name__ == "__main__":
    main()
