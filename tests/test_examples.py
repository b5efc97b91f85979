"""The examples do what they say, in seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the checkout's examples"),
    pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback"),
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recurrent_ppo_learns_to_remember():
    assert load("recurrent_ppo").main(updates=30) > 0.9  # by chance 0.5


def test_forecaster_beats_the_last_value():
    assert load("ragged_forecast").main(updates=60) < 0.5


def test_voice_activity_is_streamed():
    assert load("voice_activity").main(updates=25) > 0.9
