"""What do ternary weights, int8 activations and coarser scales cost?

`python experiments/2026-11-24-ternary/study.py --out outputs/ternary-study`
"""

from __future__ import annotations

from nanochat.studies.cli import study, study_parser

ARMS = {
    "one table": ["model.value_embeddings=1"],  # the default: blocks of 256, int8 activations per token
    "row scales": ["model.value_embeddings=1", "model.weight_block=row"],
    "float activations": ["model.value_embeddings=1", "model.activation_scale=none"],
    "float weights and activations": ["model.value_embeddings=1", "model.ternary=false"],
}

if __name__ == "__main__":
    given = study_parser(__doc__, 300, ["experiment=tiny"]).parse_args()
    study(given, ARMS, [])
