"""The files in deploy/, as far as they can be checked without Docker: what they copy exists, what they call parses."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch

import pytest
import yaml

from nanochat.serve.cli import parser
from tests.commands import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
UNIT = (DEPLOY / "nanochat.service").read_text()
COMPOSE = (DEPLOY / "compose.yaml").read_text()
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE)).splitlines()
    if line.strip()
]


def of(name):
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


def test_the_image_gets_what_the_wheel_is_made_of():
    """Every file that is copied from the context exists and is not ignored; nothing that the build reads is missing."""
    copied = [source for line in of("COPY") if "--from" not in line for source in line.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().split()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch(source, pattern) for pattern in ignored), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "pyproject.toml", "LICENSE"}
    assert needed | {"constraints.txt"} == set(copied)


def test_the_image_runs_what_it_has():
    assert {name for name, _ in INSTRUCTIONS} <= {
        "ARG", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL", "USER", "WORKDIR",
    }  # fmt: skip
    assert all(re.search(r":\d", image) for image in of("FROM"))
    assert of("USER") == ["nanochat"]
    variables = dict(part.split("=", 1) for line in of("ENV") for part in line.split())
    targets = [line.split()[-1] for line in of("COPY") if "--from=build" in line]
    assert variables["NANOCHAT_LLAMA_CPP"] in targets
    assert variables["PATH"].split("/bin")[0] in targets
    program, verb, *options = json.loads(of("ENTRYPOINT")[0])
    assert (program, verb) == ("nanochat", "serve")
    port = parser().parse_args([*options, "/models/latest"]).port
    assert of("EXPOSE") == [str(port)]
    assert f"127.0.0.1:{port}/health" in of("HEALTHCHECK")[0]


def test_compose_builds_and_runs_it():
    service = yaml.safe_load(COMPOSE)["services"]["nanochat"]
    context = (DEPLOY / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).is_file()
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    plain, keyed = (parser().parse_args(json.loads(line)) for line in re.findall(r"command: (.*)", COMPOSE))
    assert plain.api_key_file is None
    assert str(keyed.api_key_file) == "/run/secrets/keys"


def with_keys(unit: str) -> str:
    """The unit as its comments describe it for a server with keys."""
    lines = [line for line in unit.splitlines() if not line.startswith("ExecStart=")]
    return "\n".join(re.sub(r"^#   ", "", line) for line in lines if not line.startswith("#   cp"))


@pytest.mark.parametrize("unit", [UNIT, with_keys(UNIT)], ids=["plain", "with keys"])
def test_the_systemd_unit(unit, tmp_path):
    (start,) = re.findall(r"(?m)^ExecStart=(.*)", unit)
    program, verb, *options = shlex.split(start)
    assert (program, verb) == ("/opt/nanochat/bin/nanochat", "serve")
    parser().parse_args(options)
    if shutil.which("systemd-analyze") is None:
        return
    path = tmp_path / "nanochat.service"
    path.write_text(unit.replace(program, "/bin/true"))  # verify wants the program to be there
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
