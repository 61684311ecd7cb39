"""Does token filtering pay? `python experiments/2026-11-23-collider/study.py --out outputs/collider-study`"""

from __future__ import annotations

from nanochat.studies.cli import study, study_parser
from nanochat.studies.runner import train

SPARSITIES = (0.2, 0.4, 0.5)


def main() -> None:
    options = study_parser(__doc__, 120, ["experiment=tiny", "model.value_embeddings=0", "data.val_tokens=40000"])
    options.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    options.add_argument("--scores", nargs="+", default=["loss", "excess", "random"])
    options.add_argument("--clock", type=float, nargs="*", default=[0.4], help="sparsities compared at equal time, too")
    given = options.parse_args()
    arms: dict[str, list[str]] = {"off": []}
    reference = (given.out / "reference").resolve()
    cached = [f"collider.reference={reference}", f"collider.cache={(given.out / 'scores').resolve()}"]
    if "excess" in given.scores:
        # the reference: the same model on the same text, another seed, the same number of steps
        train([*given.base, "seed=1000"], given.out / "reference", given.steps)
        for seed in range(given.seeds):
            # fills the cache, also for the further steps at equal time: else the first arm would be timed with that
            words = ["+collider=on", "collider.score=excess", *cached, f"seed={seed}"]
            train([*given.base, *words], given.out / f"fill-{seed}", round(1.3 * given.steps))
    for score in given.scores:
        extra = [f"collider.score={score}"]
        extra += cached if score == "excess" else []
        for sparsity in given.sparsity:
            arms[f"{score}-{sparsity:g}"] = ["+collider=on", f"collider.sparsity={sparsity:g}", *extra]
    timed = [f"{score}-{sparsity:g}" for score in given.scores for sparsity in given.clock]
    study(given, arms, [arm for arm in timed if arm in arms])


if __name__ == "__main__":
    main()
