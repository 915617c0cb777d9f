from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml

from dpkd_offline.common import console, secrets
from dpkd_offline.common.errors import UsageError
from dpkd_offline.common.files import read_json, write_json
from dpkd_offline.common.locations import located
from dpkd_offline.common.secrets import redacted, redacted_value, remember_secrets
from dpkd_offline.config.base import write_yaml
from dpkd_offline.config.data import GenerateConfig
from dpkd_offline.config.recipe import from_recipe, read_recipe
from dpkd_offline.pipeline import distill
from dpkd_offline.pipeline.box import Box
from dpkd_offline.pipeline.stages import Stage

PASSWORD = 'pä"ss w0rd&'  # as it is meant; in a URL it stands encoded
URL = f"http://ann:{quote(PASSWORD)}@host:8000"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_given", set())


def test_a_secret_is_found_in_every_form_that_it_is_sent_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "hf_0123456789")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:proxy-pass@proxy:3128")
    remember_secrets(f"--url {URL}/v1,https://x/y?token=q-token-1&other=plain-value")
    for form in (
        PASSWORD,
        quote(PASSWORD, safe=""),
        quote(PASSWORD, safe="").lower(),
        json.dumps(PASSWORD)[1:-1],
        base64.b64encode(f"ann:{PASSWORD}".encode()).decode(),
        base64.b64encode(f"somebody:{PASSWORD}".encode()).decode()[12:],  # 9 bytes before it are 12 letters
        "hf_0123456789",
        "proxy-pass",
        "q-token-1",
    ):
        assert redacted(f"<{form}>") == "<***>", form
    assert redacted("ann at host, plain-value") == "ann at host, plain-value"
    assert redacted(URL) == "http://***@host:8000"


def test_a_name_in_a_url_is_no_secret() -> None:
    remember_secrets("ssh://git@host/a hf://datasets/team/data@main https://host/@me")
    assert redacted("git@host main @me") == "git@host main @me"


def test_what_is_written_and_printed_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    located("ftp://ann:hunter2-and-more@host/data")
    value = {"served": "hunter2-and-more", "hunter2-and-more": ["x hunter2-and-more"], "n": 1}
    hidden = {"served": "***", "***": ["x ***"], "n": 1}
    write_json(tmp_path / "a.json", value)
    write_yaml(tmp_path / "a.yaml", value)
    assert read_json(tmp_path / "a.json") == hidden == yaml.safe_load((tmp_path / "a.yaml").read_text())
    console.info("said hunter2-and-more")
    console.result("hunter2-and-more")
    assert capsys.readouterr() == ("***\n", "said ***\n")


def test_a_short_password_ruins_no_hash() -> None:
    remember_secrets("http://ann:abc@host")
    assert redacted_value({"sha256": "0abc1", "url": "http://ann:abc@host"}) == {
        "sha256": "0abc1",
        "url": "http://***@host",
    }


def test_a_stage_has_its_password_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GenerateConfig(dataset=tmp_path / "d", role="teacher", model="m", prompts="p", url=(URL, "http://other"))
    started: list[tuple[Sequence[str], Mapping[str, str]]] = []
    monkeypatch.setattr(distill, "_run", lambda command, given: (started.append((command, given)), (0, 0))[1])
    runner = distill.Runner(tmp_path, 1, {}, Box([]))
    runner.run(Stage("generate: teacher", "generate", config), 1)
    ((command, given),) = started
    given_as = Path(command[command.index("--config") + 1])
    settings = given_as.with_name(given_as.name.removeprefix("new-"))  # once the stage has begun with them
    for secret in (PASSWORD, quote(PASSWORD)):
        assert all(secret not in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
        assert all(secret not in part for part in command)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert from_recipe(GenerateConfig, "generate", settings, {}) == config
    monkeypatch.setattr(secrets, "_given", set())
    assert redacted(f"{PASSWORD}") == redacted(quote(PASSWORD)) == "***"  # in the stage, too


def test_a_recipe_is_read_before_it_is_spoken_of(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"teacher: t\nstudent: s\noutput: o\ngenerate: {{prompts: p, url: '{URL}'}}\n")
    read_recipe(recipe, ["score_teacher.url=http://bob:another-one@h"])
    assert redacted(f"{PASSWORD} another-one") == "*** ***"
    for text in ("a: 2026-99-99", "a: " + "[" * 5000, "a: {b"):
        recipe.write_text(text)
        with pytest.raises(UsageError, match=r"recipe\.yaml"):
            read_recipe(recipe)


def test_the_command_line_itself_is_not_quoted(run_cli, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    done = run_cli("distill", "--set", "http://ann:my-password@host", "none.yaml")
    assert done.returncode == 2 and "my-password" not in done.stderr + done.stdout
