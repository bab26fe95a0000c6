"""The browser for tests of pages: no wheel brings one, so it is the machine's own."""

import os
import shutil

import pytest

# TEST_BROWSER=PATH names one; tests then fail where it does not work, instead of being left out.
VARIABLE = "TEST_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def browser() -> str | None:
    """The executable of Chromium or Chrome, or None."""
    if VARIABLE in os.environ:
        named = shutil.which(os.environ[VARIABLE])
        if named is None:
            raise pytest.UsageError(
                f"{VARIABLE}={os.environ[VARIABLE]} is no executable; install Debian's chromium, or unset it"
            )
        return named
    return next((found for name in NAMES if (found := shutil.which(name))), None)
