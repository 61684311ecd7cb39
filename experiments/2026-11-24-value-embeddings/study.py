"""Do value embeddings pay? `python experiments/2026-11-24-value-embeddings/study.py --out outputs/value-study`"""

from __future__ import annotations

from nanochat.studies.cli import study, study_parser

ARMS = {
    "none": ["model.value_embeddings=0"],
    "one table": ["model.value_embeddings=1"],
    "one table, half as wide": ["model.value_embeddings=1", "model.value_embedding_width=128"],
    "two tables": ["model.value_embeddings=2"],
    "two tables, gates of the input": [
        "model.value_embeddings=2", "model.value_gate=input", "model.value_embedding_layers=[1,3]",
    ],
}  # fmt: skip

if __name__ == "__main__":
    parser = study_parser(__doc__, 300, ["experiment=tiny"])
    parser.add_argument("--equal-time", action="store_true", help="train the arms once more, for the plain run's time")
    given = parser.parse_args()
    study(given, ARMS, [arm for arm in ARMS if arm != "none"] if given.equal_time else [])
