"""Check the pinned dependencies for known vulnerabilities with pip-audit.

    make audit

pip-audit asks pypi.org about each version in constraints.txt. It says "No known vulnerabilities found" even if it could not ask
about any version, for example because a package index has no advisories. This script therefore also prints how many versions
were checked. It does not install or run the packages that it checks.

Exit status: 0 if all versions were checked and none has a known vulnerability; 1 if some have one; 3 if no vulnerability is
known, but not all versions could be checked.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VULNERABLE, UNCHECKED = 1, 3


def ask(pins: Path) -> tuple[list[dict[str, Any]], str]:
    """Return what pip-audit reports about each version in a file ([] if it could not ask), and its last line of output."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "audit.json")
        flags = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", "15", "-f", "json", "-o", str(output)]
        command = [sys.executable, "-m", "pip_audit", "-r", str(pins), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        words = [line for line in done.stderr.splitlines() if line.strip() and "--no-deps" not in line]
        found = json.loads(output.read_text(encoding="utf-8"))["dependencies"] if output.is_file() else []
    return found, words[-1] if words else f"pip-audit ended with status {done.returncode}"


def judge(found: list[dict[str, Any]], pinned: int, words: str) -> tuple[int, list[str]]:
    """Return the exit status and the lines to print.

    Args:
        found: what pip-audit reports about each version, from its JSON output.
        pinned: number of versions to check.
        words: the last line of pip-audit's output, for the case that it could not check anything.
    """
    lines = []
    for package in found:
        for known in package.get("vulns", []):
            mend = ", ".join(known["fix_versions"]) or "none yet"
            lines.append(f"{package['name']} {package['version']}: {known['id']}; fixed in: {mend}")
    skipped = [package["skip_reason"] for package in found if "skip_reason" in package]
    checked = len(found) - len(skipped)
    lines.append(f"{len(lines)} known vulnerabilities; {checked} of {pinned} pinned versions were checked")
    if checked < pinned:
        reason = skipped[0] if skipped else words
        lines.append(f"not checked: {pinned - checked}; the reason for the first one: {' '.join(reason.split())}")
    return VULNERABLE if len(lines) > 1 + (checked < pinned) else UNCHECKED if checked < pinned else 0, lines


def main() -> int:
    """Check constraints.txt, print the known vulnerabilities, and return the exit status."""
    pins = ROOT / "constraints.txt"
    pinned = sum("==" in line for line in pins.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    found, words = ask(pins)
    status, lines = judge(found, pinned, words)
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
