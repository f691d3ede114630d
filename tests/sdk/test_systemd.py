"""The unit file, as systemd itself reads it."""
import re
import subprocess

import stack

UNIT = stack.ROOT / "systemd/behavry-ollama-proxy.service"


def unit_with_an_installed_binary(tmp_path):
    """The unit with ExecStart's path replaced by a program that exists here: verify looks for it."""
    text, times = re.subn(r"^(Exec\w+=)/usr/bin/behavry-ollama-proxy\b", rf"\g<1>{stack.BINARY}", UNIT.read_text(),
                          flags=re.MULTILINE)
    assert times >= 1
    copy = tmp_path / UNIT.name
    copy.write_text(text)
    return copy


def test_systemd_finds_nothing_to_complain_about(tmp_path):
    stack.needs("systemd-analyze", "systemd")
    unit = unit_with_an_installed_binary(tmp_path)
    checked = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60)
    complaints = [line for line in (checked.stdout + checked.stderr).splitlines() if UNIT.name in line]
    assert complaints == [] and checked.returncode == 0, checked.stderr


def test_the_unit_stays_locked_up(tmp_path):
    """systemd's own score: 0 is locked, 10 is open. A hardening that is taken out shows here."""
    stack.needs("systemd-analyze", "systemd")
    unit = unit_with_an_installed_binary(tmp_path)
    scored = subprocess.run(["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", str(unit)],
                            capture_output=True, text=True, timeout=60)
    assert scored.returncode == 0, scored.stdout[-500:] + scored.stderr
