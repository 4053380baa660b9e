"""The package of `docs/attach-a-backbone.md` installs, and its backbone keeps the contract."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from outside import IPN, files, install, run, write

from ipn_core import Backbone
from ipn_core.scaffold import KINDS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "attach-a-backbone.md").read_text(encoding="utf-8")


def test_it_names_what_a_backbone_has() -> None:
    named = re.findall(r"^\| `(\w+)[`(]", PAGE, re.MULTILINE)
    assert named == ["MODEL_TYPES", "layers", "TEMPLATE", "place_keys"]
    assert all(hasattr(Backbone, name) for name in [*named, "SHARES"])
    (kind,) = re.findall(r"^ipn new (\w+) \w+$", PAGE, re.MULTILINE)
    assert kind in KINDS


@pytest.mark.slow
def test_its_package_is_found_and_passes_its_own_test(tmp_path: Path) -> None:
    package, site = tmp_path / "ipn-my-qwen", tmp_path / "site"
    write(files(PAGE), package)
    install(package, site)
    found = json.loads(run([IPN, "plugins", "--json"], tmp_path, site))
    (mine,) = [p for p in found["plugins"] if p["distribution"] == "ipn-my-qwen"]
    assert mine["components"] == {"backbone": ["qwen2"]}
    assert mine["faults"] == []
    told = run([sys.executable, "-m", "pytest", "-q", "ipn-my-qwen"], tmp_path, site)
    assert re.search(r"^(\d\d) passed", told.splitlines()[-1]), told
