"""Runs a command and fails when it holds more than a limit: `peak-memory.py MIB COMMAND …`.

The figure is the peak of the process's anonymous memory (what it allocates), sampled from /proc, and its peak resident
set, which counts the pages of the mapped checkpoint too. The limit is on the first.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

limit, command = float(sys.argv[1]), sys.argv[2:]
process = subprocess.Popen(command)
status = Path(f"/proc/{process.pid}/status")
if not status.exists():
    print("skipped: memory is read from /proc, which is not here")
    sys.exit(process.wait())
peaks = {"RssAnon": 0, "VmHWM": 0}
while process.poll() is None:
    try:
        text = status.read_text()
    except OSError:
        break
    for name in peaks:
        found = re.search(rf"{name}:\s+(\d+) kB", text)
        peaks[name] = max(peaks[name], int(found.group(1)) if found else 0)
    time.sleep(0.002)
allocated, resident = (peaks[name] / 1024 for name in ("RssAnon", "VmHWM"))
print(f"allocated at most {allocated:.0f} MiB (limit {limit:.0f}), resident at most {resident:.0f} MiB")
sys.exit(process.wait() or int(allocated > limit))
