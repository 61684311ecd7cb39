"""samples.md."""

from __future__ import annotations

from pathlib import Path

from nanochat.run import train
from nanochat.training.callbacks.sampler import fenced
from tests.runs import configure
from tests.training.callbacks.short_runs import RUN


def test_resume_drops_later_samples(place: Path, whole: tuple[Path, dict[str, float]]) -> None:
    folder = place / "samples"
    train(configure(place, RUN), folder)
    text = (folder / "samples.md").read_text()
    cut = text.index("## Step 4") + 30  # as a kill while it was written leaves it
    (folder / "samples.md").write_text(text[:cut] + "\n## Step 5\n\nof a run that was given up\n")
    train(configure(place, [*RUN, f"ckpt_path='{folder / 'checkpoints' / 'step=4.ckpt'}'"]), folder)
    assert (folder / "samples.md").read_text() == text == (whole[0] / "samples.md").read_text()


def test_no_prompts_are_no_samples(place: Path) -> None:
    train(configure(place, [*RUN, "callbacks.sampler.prompts=[]", "trainer.max_steps=2"]), place / "silent")
    assert not (place / "silent" / "samples.md").exists()


def test_a_sample_cannot_end_its_block() -> None:
    assert fenced("a\n```\nb") == "````\na\n```\nb\n````"
