"""Run the quickstart as a newcomer does, and record its closing table and its time.

python benchmarks/quickstart.py --out benchmarks/results/quickstart.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tosa_convert", "quickstart", "--json", "--out", "tosa-quickstart"]
        started = time.monotonic()
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        seconds = round(time.monotonic() - started)
    record.write(arguments.out, {"seconds": seconds, "results": json.loads(done.stdout)})
