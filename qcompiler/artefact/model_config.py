"""Converts the original model's configuration to text for the artefact, and back."""

import json
from collections.abc import Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from qcompiler.artefact.strict_json import render
from qcompiler.capture.quiet import third_party_silence


def config_to_text(config: Any) -> str | None:
    """A configuration with `to_dict`, such as one of transformers, as JSON; None if JSON cannot hold it."""
    if not callable(make := getattr(config, "to_dict", None)):
        return None
    try:
        return render(json.loads(json.dumps(make())))
    except (TypeError, ValueError, RecursionError):
        return None


def config_from_entries(entries: Mapping[str, Any]) -> Any:
    """Builds transformers' configuration class for the `model_type`; a plain namespace if there is none."""
    try:
        with third_party_silence():
            return import_module("transformers").AutoConfig.for_model(**entries)
    except Exception:  # transformers is missing, older than the model, or rejects an entry
        return SimpleNamespace(**entries)
