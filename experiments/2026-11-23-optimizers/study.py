"""What do the optimizers cost in loss? `python experiments/2026-11-23-optimizers/study.py --out outputs/optim-study`"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat.studies.cli import study_parser
from nanochat.studies.runner import train
from nanochat.studies.statistics import Result, difference

BASE = [
    "model=d20", "model.vocab_size=4096", "model.seq_len=128", "data.batch_size=8",
    "schedule.warmup_steps=12", "data.val_tokens=20000",
]  # fmt: skip
REFRESH = "optim.update_period=40"  # three projectors a run
TUNING_SEED = 1000  # no seed of the comparison
SHORT = 0.75

# rate searched first, and where its search begins; each step doubles or halves
SEARCHES = {
    "muon": [("optim.tied_lr", 0.02), ("optim.lr", 0.02)],
    "adamw": [("optim.lr", 0.003), ("optim.tied_lr", 0.003)],
    "lion": [("optim.lr", 0.0006), ("optim.tied_lr", 0.0006)],
    "galore": [("optim.lr", 0.03)],
    "galore-muon8bit": [("optim.lr", 0.02)],
    "apollo": [("optim.lr", 0.01)],
}
# whose rates the others take
RATES_OF = {"adamw8bit": "adamw", "lion8bit": "lion", "muon8bit": "muon", "galore8bit": "galore"}
PAIRED = ["muon", "muon8bit", "adamw", "galore"]


def settings(optim: str) -> list[str]:
    return [f"optim={optim}", *([REFRESH] if "galore" in optim or optim == "apollo" else [])]


def descend(loss: Callable[[float], float], start: float, factor: float = 2.0, reach: int = 3) -> float:
    """The best of start * factor^i, walked downhill from the start, at most `reach` steps."""
    seen = {0: loss(start)}
    for side in (1, -1):
        i = side
        while abs(i) <= reach:
            seen[i] = loss(start * factor**i)
            if seen[i] > min(seen.values()):
                break
            i += side
        if min(seen, key=seen.__getitem__) > 0:
            break
    return start * factor ** min(seen, key=seen.__getitem__)


def main() -> None:
    given = study_parser(__doc__, 120, BASE).parse_args()
    out: Path = given.out

    def tune(optim: str, rates: dict[str, float]) -> dict[str, float]:
        """The rates, one after the other, the others held."""
        rates = dict(rates)
        for key, start in SEARCHES[optim]:

            def loss(rate: float, key: str = key) -> float:
                trial = {**rates, key: rate}
                words = [f"{k}={v:.6g}" for k, v in trial.items()]
                name = "-".join(["tune", optim, *(w.removeprefix("optim.").replace("=", "_") for w in words)])
                overrides = [*given.base, *settings(optim), *words, f"seed={TUNING_SEED}"]
                return train(overrides, out / name, given.steps).bpb

            rates[key] = descend(loss, rates.get(key, start))
        return rates

    with ThreadPoolExecutor(given.jobs) as pool:
        first = {name: pool.submit(tune, name, {}) for name in ("muon", "adamw")}
        # the table's rate is AdamW's in every rule for matrices: Muon's search has found it
        table = {"optim.tied_lr": first["muon"].result()["optim.tied_lr"]}
        rest = {
            name: pool.submit(tune, name, table if name != "lion" else {}) for name in SEARCHES if name not in first
        }
        tuned = {name: future.result() for name, future in {**first, **rest}.items()}
        tuned |= {name: tuned[like] for name, like in RATES_OF.items()}
        (out / "rates.json").write_text(json.dumps(tuned, indent=1))

        def run(optim: str, seed: int, steps: int, arm: str, *extra: str) -> Result:
            words = [f"{k}={v:.6g}" for k, v in tuned[optim].items()]
            overrides = [*given.base, *settings(optim), *words, *extra, f"seed={seed}"]
            return train(overrides, out / f"{arm}-{seed}", steps)

        seeds = range(given.seeds)
        no_momentum = ("optim.momentum=0", "optim.momentum_start=0")
        runs = {(name, s): pool.submit(run, name, s, given.steps, name) for s in seeds for name in PAIRED}
        for s in seeds:
            runs["muon, 0.75x steps", s] = pool.submit(run, "muon", s, round(SHORT * given.steps), "muon-short")
            runs["muon, no momentum", s] = pool.submit(run, "muon", s, given.steps, "muon-broken", *no_momentum)
        for name in tuned:
            if name not in PAIRED:
                runs[name, 0] = pool.submit(run, name, 0, given.steps, name)
        results: dict[str, list[Result]] = {}
        for (name, _), future in runs.items():
            results.setdefault(name, []).append(future.result())
    report(given.steps, results, tuned)
    plot(results, Path(__file__).with_name("bpb.png") if given.steps >= 100 else out / "bpb.png")


def report(steps: int, results: dict[str, list[Result]], tuned: dict[str, dict[str, float]]) -> None:
    """The table: bits per byte, paired differences to Muon and to AdamW, state, rates."""
    print(f"\n{steps} steps\n\n| optim | bpb | seeds | to muon | to adamw | state, MB | rates |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in sorted(results.items(), key=lambda item: statistics.mean(r.bpb for r in item[1])):
        gaps = ["" if name == other else difference(runs, results[other][: len(runs)]) for other in ("muon", "adamw")]
        rates = " ".join(f"{k.removeprefix('optim.')}={v:.4g}" for k, v in tuned[name.split(",")[0]].items())
        cells = [
            name,
            f"{statistics.mean(r.bpb for r in runs):.4f}",
            len(runs),
            *gaps,
            f"{runs[0].state_bytes / 1e6:.2f}",
        ]
        print("| " + " | ".join(map(str, [*cells, rates])) + " |")


def plot(results: dict[str, list[Result]], path: Path) -> None:
    """Bits per byte over bytes of state, one point a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name, runs in results.items():
        if "," not in name:
            (line,) = axes.plot([r.state_bytes / 1e6 for r in runs], [r.bpb for r in runs], "o")
            corner = (runs[0].state_bytes / 1e6, statistics.mean(r.bpb for r in runs))
            axes.annotate(name, corner, xytext=(6, 3), textcoords="offset points", color=line.get_color())
    axes.set(
        xlabel="optimizer state, MB", ylabel="validation bits per byte", title="d20, vocabulary 4,096: loss and memory"
    )
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
