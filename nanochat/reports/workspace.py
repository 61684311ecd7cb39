"""The panels as a workspace and a report of W&B, made with wandb-workspaces."""

from __future__ import annotations

from typing import Any

from nanochat.errors import UserError
from nanochat.reports.panels import BLOCKS, SAMPLES, SUMMARY, Panel

NAME = "nanochat"
X = {"tokens": "tokens", "time": "_runtime"}
COLUMNS, WIDTH, HEIGHT = 3, 8, 6
"""panels in a row of a report, and the size of one; a row is 24 wide"""


def workspace(project: str, entity: str) -> Any:
    """The project's workspace: a section for each block of panels, the summary and the samples."""
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=heading, panels=panels, is_open=not hidden) for heading, panels, hidden in _sections()]
    settings = ws.WorkspaceSettings(x_axis="tokens", max_runs=20)
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections, settings=settings)


def report(project: str, entity: str) -> Any:
    """The same as a report, with a word on what a block needs."""
    from wandb_workspaces.reports.v2 import interface as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for heading, panels, needs in _sections():
        for i, panel in enumerate(panels):
            panel.layout = wr.Layout(x=i % COLUMNS * WIDTH, y=i // COLUMNS * HEIGHT, w=WIDTH, h=HEIGHT)
        blocks += [wr.H2(text=heading), *([wr.P(text=f"Of runs with {needs}.")] if needs else [])]
        blocks.append(wr.PanelGrid(runsets=[wr.Runset()], panels=panels))  # runs of the report's own project
    return wr.Report(project=project, entity=entity, title=f"{project}: does it pay?", blocks=blocks, width="fluid")


def save(project: str, entity: str | None) -> tuple[str, str]:
    """Make both in an account; returns their addresses.

    Raises:
        UserError: a package is missing, or the server refuses.
    """
    try:
        import wandb
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"a dashboard needs the package {error.name}: pip install 'nanochat[wandb]'.") from error
    try:
        owner = entity or wandb.Api().default_entity
        if not owner:
            raise UserError("the account has no default entity; name one with --entity.")
        made, written = workspace(project, owner), report(project, owner)
        written.save()  # makes the project, where there is none
        made.save()
        return str(made.url), str(written.url)
    except UserError:
        raise
    except Exception as error:  # the client and its library raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"W&B refuses the dashboard of {project}: {reason}.") from error


def _sections() -> list[tuple[str, list[Any], str]]:
    """Heading, panels and needs of every section."""
    from wandb_workspaces.reports.v2 import interface as wr

    found = [(block.heading, [_line(panel) for panel in block.panels], block.needs) for block in BLOCKS]
    bars: list[Any] = [wr.BarPlot(title=key, metrics=[wr.SummaryMetric(key)]) for key in SUMMARY]
    found.insert(1, ("Summary", bars, ""))
    texts = wr.WeavePanelSummaryTable(table_name=SAMPLES)
    return [*found, ("What they write", [texts], "")]


def _line(panel: Panel) -> Any:
    from wandb_workspaces.reports.v2 import interface as wr

    y: dict[str, Any] = {"metric_regex": panel.pattern()} if panel.numbered else {"y": list(panel.keys)}
    return wr.LinePlot(title=panel.title, x=X[panel.against], title_y=panel.unit, **y)
