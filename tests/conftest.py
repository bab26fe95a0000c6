"""Set-up shared by all tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub is a bug

from nexus_gen.compat import ensure_torchvision  # noqa: E402

ensure_torchvision()
