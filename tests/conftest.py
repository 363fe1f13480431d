"""What every test may rely on: one torch thread, no cache or run files outside the test's own folder, Ctrl-C that works."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

# Before anything imports torch: oversubscribed threads make a small machine many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Whoever starts us in the background of a script has SIGINT ignored, and the programs under test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A loaded machine must not fail a property because one example was slow; pytest-timeout bounds the whole.
settings.register_profile("tandem", deadline=None, print_blob=True)
settings.load_profile("tandem")


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own TANDEM_ variables change no test; the model cache is kept, it is expensive."""
    for name in list(os.environ):
        if name.startswith("TANDEM_") and name != "TANDEM_CACHE":
            monkeypatch.delenv(name)
