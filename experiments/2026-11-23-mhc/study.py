"""Do hyper-connections pay? `python experiments/2026-11-23-mhc/study.py --out outputs/mhc-study`"""

from __future__ import annotations

from nanochat.studies.cli import study, study_parser

BASE = ["experiment=tiny", "model.value_embeddings=0", "data.val_tokens=40000"]
ARMS = {
    "off": [],
    "2-streams": ["+mhc=on", "mhc.streams=2"],
    "4-streams": ["+mhc=on", "mhc.streams=4"],
    "2-dynamic": ["+mhc=on", "mhc.streams=2", "mhc.maps=dynamic"],
}

if __name__ == "__main__":
    given = study_parser(__doc__, 120, BASE).parse_args()
    study(given, ARMS, [arm for arm in ARMS if arm != "off"])
