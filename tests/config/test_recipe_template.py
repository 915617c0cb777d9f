"""The commented recipe: it parses, its defaults are the true ones, and what `distill` sets itself is not offered."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.tiny import rows, write_jsonl

from dpkd_offline.config.recipe import Recipe, Regeneration, read_recipe
from dpkd_offline.config.recipe_template import SECTIONS, recipe_keys_table, recipe_template
from dpkd_offline.pipeline.stages import Stage, plan

BLANKS = {"teacher": "big", "student": "small", "output": "run", "  prompts": "p.jsonl"}


def filled(text: str, **values: object) -> str:
    """The template with its blanks filled in."""
    for key, value in {**BLANKS, **values}.items():
        text, count = re.subn(f"(?m)^{key}:$", f"{key}: {value}", text, count=1)
        assert count == 1, key
    return text


def stages_of(folder: Path, text: str) -> list[Stage]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return plan(read_recipe(path), path)


def test_the_template_has_every_key_and_its_blanks_are_what_is_required(tmp_path: Path) -> None:
    text = recipe_template()
    assert max(map(len, text.splitlines())) <= 120
    assert yaml.safe_load(text) == {"teacher": None, "student": None, "output": None, "generate": {"prompts": None}}
    for name in Recipe.model_fields:
        assert re.search(f"(?m)^#?{name}:", text)
    titles = [stage.title for stage in stages_of(tmp_path, filled(text))]
    assert titles == ["generate: teacher", "generate: student", "score-teacher", "train"]


def test_without_the_marks_every_key_has_its_default(tmp_path: Path) -> None:
    """Also that `stop_when_ruined` is on in `distill`."""
    text = filled(recipe_template())
    bare = stages_of(tmp_path, text + "\nevaluate: {prompts: t.jsonl}\n")
    text = re.sub(r"(?m)^(  )?#(?=[a-z_]+:|  )", r"\1", text)
    sections = yaml.safe_load(text)
    assert sections.keys() == Recipe.model_fields.keys()
    for name, section in SECTIONS.items():
        if not section.like:
            assert sections[name].keys() == section.keys().keys()
    off = [
        name for name in Recipe.model_fields if name not in (*BLANKS, "generate", "score_teacher", "train", "evaluate")
    ]
    kept = {name: value for name, value in sections.items() if name not in off}
    kept["evaluate"]["prompts"] = "t.jsonl"
    assert stages_of(tmp_path, yaml.safe_dump(kept)) == bare


@pytest.mark.parametrize("name", [name for name in SECTIONS if name not in ("regenerate", "init_student")])
def test_what_distill_sets_itself_is_not_offered(name: str, tmp_path: Path) -> None:
    """Every other key of a section reaches its stage."""
    section = SECTIONS[name]
    required, judge = {"prompts": "p.jsonl"}, {"judge_model": "m", "url": ["http://x"]}
    recipe = {"teacher": "big", "student": "small", "output": "run", "generate": required, name: {}}
    needed = {"generate_teacher": required, "evaluate": required, "generate": required, "judge": judge}
    values = {**needed, "subset": {"limit": 5}}.get(name, {})
    recipe |= {"evaluate": required} if name == "judge" else {}
    fixed = set(section.config.model_fields) - section.keys().keys()
    changes = {key: f"other/{key}" for key in fixed & {"dataset", "model", "student", "output", "teacher", "a", "b"}}
    plain = stages_of(tmp_path, yaml.safe_dump({**recipe, name: values}))
    changed = stages_of(tmp_path, yaml.safe_dump({**recipe, name: {**values, **changes}}))
    if name == "evaluate":  # of the one it has
        assert changes.keys() == {"model", "teacher", "output"}
    assert changed == plain


def test_distill_init_writes_a_recipe_that_a_dry_run_accepts(
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
    teachers: dict[str, Path],
    students: dict[str, Path],
    tmp_path: Path,
) -> None:
    path = tmp_path / "recipe.yaml"
    done = run_cli("distill", "--init", path)
    assert (done.returncode, done.stdout, path.read_text()) == (0, f"{path}\n", recipe_template())
    again = run_cli("distill", "--init", path)
    assert (again.returncode, again.stderr) == (2, f"dpkd-offline: {path}: File exists\n")
    prompts = write_jsonl(tmp_path / "p.jsonl", rows(3))
    models = {"teacher": teachers["llama"], "student": students["llama"]}
    path.write_text(filled(path.read_text(), **models, **{"  prompts": prompts}))
    done = run_cli("distill", path, "--dry-run", "--set", "generate.max_new_tokens=8")
    assert done.returncode == 0, done.stderr
    assert "generate: teacher" in done.stdout


def test_the_keys_as_a_table_are_those_of_a_recipe() -> None:
    names = list(Recipe.model_fields)
    before, after = names[: names.index("regenerate")], names[names.index("regenerate") + 1 :]
    lines = recipe_keys_table().splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == [
        *before,
        "regenerate",
        *(f"regenerate.{key}" for key in Regeneration.model_fields),
        *after,
    ]
