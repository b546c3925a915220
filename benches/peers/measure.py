"""Runs a command in a new process and says how long it took and how much memory it held."""

import os
import re
import subprocess
import sys
import time


def measure(command, **options):
    """Wall time in seconds; peak resident and peak allocated (anonymous) memory in bytes, sampled from /proc."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    os.set_blocking(process.stdout.fileno(), False)
    output, peaks = b"", {"VmHWM": 0, "RssAnon": 0}
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status", encoding="utf-8") as file:
                text = file.read()
        except OSError:
            text = ""
        for name in peaks:
            found = re.search(rf"{name}:\s+(\d+) kB", text)
            peaks[name] = max(peaks[name], int(found.group(1)) << 10 if found else 0)
        output += process.stdout.read() or b""
        time.sleep(0.002)
    seconds = time.perf_counter() - started
    output += process.stdout.read() or b""
    if process.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{output.decode(errors='replace')[-4000:]}")
    return {"seconds": seconds, "resident": peaks["VmHWM"], "allocated": peaks["RssAnon"]}
