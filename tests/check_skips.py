"""Fail when a test was skipped that tests/allowed-skips.txt does not list.

`python tests/check_skips.py build/junit.xml`, in CI: a capability that went missing there would
otherwise turn tests off without anyone noticing.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree as ET

ALLOWED = Path(__file__).with_name("allowed-skips.txt")


def skipped(junit: Path) -> dict[str, str]:
    """Return the id of each skipped test and why it was skipped; expected failures are none."""
    reasons = {}
    for case in ET.parse(junit).iter("testcase"):  # noqa: S314 - pytest's own report
        skip = case.find("skipped")
        if skip is not None and skip.get("type") != "pytest.xfail":
            # A module skipped as a whole has no class name.
            parts = (case.get("classname"), case.get("name"))
            reasons["::".join(part for part in parts if part)] = skip.get("message", "")
    return reasons


def allowed(path: Path) -> set[str]:
    """Return the ids listed in a file of one id a line, `#` opening a comment."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def main(junit: Path, allowed_path: Path = ALLOWED) -> str | None:
    """Return what is wrong, if anything is."""
    reasons = skipped(junit)
    new = sorted(reasons.keys() - allowed(allowed_path))
    if not new:
        return None
    rows = "".join(f"\n  {test}  ({reasons[test]})" for test in new)
    return f"skipped, and not allowed to be by {allowed_path.name}:{rows}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
