"""Does multi-token prediction pay? `python experiments/2026-11-23-mtp/study.py --out outputs/mtp-study`"""

from __future__ import annotations

import time

import torch
from omegaconf import OmegaConf

from nanochat.checkpoint import load_run
from nanochat.config.vocabulary import build_data
from nanochat.inference import Request, Sampling, Scheduler, TorchBackend, inference_copy
from nanochat.inference.speculative import build_heads, drafting_backend
from nanochat.studies.cli import study, study_parser
from nanochat.studies.statistics import Result

ARMS = {
    "off": [],
    "sequential": ["+mtp=on", "mtp.kind=sequential", "mtp.tokens=1"],
    "weights-only": ["+mtp=on", "mtp.kind=weights-only", "mtp.tokens=2"],
    "parallel": ["+mtp=on", "mtp.kind=parallel", "mtp.tokens=3"],
}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 96


def validation_prompts(result: Result) -> list[list[int]]:
    """Beginnings of validation sequences."""
    data = build_data(OmegaConf.to_container(OmegaConf.load(result.folder / "config.yaml")))
    data.setup()
    data.setup("validate")
    prompts: list[list[int]] = []
    for batch in data.val_dataloader():
        prompts += [row[:PROMPT_TOKENS].tolist() for row in batch["tokens"]]
        if len(prompts) >= PROMPTS:
            break
    return prompts[:PROMPTS]


def written(scheduler: Scheduler, prompts: list[list[int]], sampling: Sampling) -> float:
    """CPU seconds for the continuations of all prompts, one after the other."""
    start = time.process_time()
    for seed, prompt in enumerate(prompts):
        scheduler.submit(Request(prompt, NEW_TOKENS, sampling, seed))
        scheduler.run()
    return time.process_time() - start


def drafting(results: list[Result]) -> None:
    """Acceptance, passes of the trunk and speed of speculative against plain decoding, greedy and sampled."""
    torch.set_num_threads(1)
    print("\n| seed | sampling | acceptance | tokens a pass | tokens/s, plain | tokens/s, speculative |")
    print("|---|---|---|---|---|---|")
    for seed, result in enumerate(results):
        run = load_run(result.folder)
        gpt, prompts = inference_copy(run.gpt), validation_prompts(result)
        heads = build_heads(run.config, run.objectives, torch.float32)
        for name, sampling in (("greedy", Sampling(0.0)), ("temperature 0.8", Sampling(0.8))):
            speculator = Scheduler(drafting_backend(gpt, heads, 1, run.config.seq_len, measured=False))
            drafted = written(speculator, prompts, sampling)
            plain = written(Scheduler(TorchBackend(gpt)), prompts, sampling)
            s, total = speculator.drafting, PROMPTS * NEW_TOKENS
            cells = [seed, name, f"{s.accepted / max(1, s.drafted):.2f}", f"{s.tokens / s.passes:.2f}"]
            print("| " + " | ".join(map(str, [*cells, f"{total / plain:.0f}", f"{total / drafted:.0f}"])) + " |")


if __name__ == "__main__":
    given = study_parser(
        __doc__, 160, ["experiment=tiny", "model.value_embeddings=0", "data.val_tokens=40000"]
    ).parse_args()
    found = study(given, ARMS, [arm for arm in ARMS if arm != "off"])
    drafting(found.equal["sequential"])
