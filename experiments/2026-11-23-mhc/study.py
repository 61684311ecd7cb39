"""Do hyper-connections pay? `python experiments/2026-11-23-mhc/study.py --out outputs/mhc-study`"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from paired import compare, parser

ARMS = {
    "off": [],
    "2-streams": ["+mhc=on", "mhc.streams=2"],
    "4-streams": ["+mhc=on", "mhc.streams=4"],
    "2-dynamic": ["+mhc=on", "mhc.streams=2", "mhc.maps=dynamic"],
}

if __name__ == "__main__":
    given = parser(__doc__, 120, ["experiment=tiny", "data.val_tokens=40000"]).parse_args()
    compare(given, ARMS, "off", [arm for arm in ARMS if arm != "off"])
