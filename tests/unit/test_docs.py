"""The pages README.md and docs/*.md: links, paths, settings, length and wording."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from shared.settings import _ELSEWHERE, Settings

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
PAGES = [README, ROOT / "services" / "client" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# Local folders that exist only after `make run`, `make models` or a copy that a reader makes.
MADE_LATER = ("data", "ckpt/official", "deploy/.env", "deploy/kubernetes/overlays/mine")
TOP_FOLDERS = ("services", "shared", "deploy", "tests", "docs", "ckpt")
FORBIDDEN = ("house", "obituary", "onlooker", "nobody", "whoever", "told", "of late")
# Descriptions of the machine on which a page was written, instead of the hardware on which something was measured.
LIMITS_OF_A_MACHINE = ("machine that this was written on", "awaiting", "awaits a gpu", "not at hand", "not yet run")


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Path and anchor of every link that does not leave the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor


@EVERY_PAGE
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for path, anchor in links(page):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    assert broken == []


@EVERY_PAGE
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(rf"(?<![\w/.-])(?:{'|'.join(TOP_FOLDERS)})/[\w./*-]*", page.read_text())
    missing = []
    for name in named:
        path = name.rstrip(".")
        if not path.startswith(MADE_LATER) and not list(ROOT.glob(path.rstrip("/"))):
            missing.append(name)
    assert missing == []


@EVERY_PAGE
def test_every_module_that_a_command_runs_exists(page: Path) -> None:
    missing = []
    for module in re.findall(r"python -m (\w+(?:\.\w+)*)", page.read_text()):
        path = ROOT / module.replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            missing.append(module)
    assert missing == []


@EVERY_PAGE
def test_every_make_target_that_a_page_names_exists(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^|&& )(?:[A-Z_0-9]+=\S+ )*make ([\w-]+)", page.read_text(), re.MULTILINE)) <= targets


@EVERY_PAGE
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    known = {item.metadata["variable"] for item in fields(Settings)} | _ELSEWHERE
    named = set(re.findall(r"\bHEARTMULA_[A-Z0-9_]*[A-Z0-9]\b", page.read_text()))
    # HEARTMULA_S3_* stands for several; HEARTMULA_BIND and HEARTMULA_GPU are variables of the compose file.
    assert named - known <= {"HEARTMULA_S3", "HEARTMULA_BIND", "HEARTMULA_GPU"}


@EVERY_PAGE
def test_every_metric_that_a_page_names_exists(page: Path) -> None:
    source = "".join(path.read_text() for top in ("services", "shared") for path in (ROOT / top).rglob("*.py"))
    known = [re.sub(r"{\w+}", r"\\w+", name) for name in re.findall(r'"(heartmula_[\w{}]+)"', source)]
    named = re.findall(r"\bheartmula_(?!client\b)[a-z_]*[a-z]\b(?!_)", page.read_text())
    assert [name for name in named if not re.fullmatch("|".join(known), name.removesuffix("_total"))] == []


def test_the_configuration_page_has_a_row_for_every_setting() -> None:
    rows = [line.split("|")[1] for line in CONFIGURATION.read_text().splitlines() if line.startswith("| `HEARTMULA_")]
    listed = re.findall(r"`(HEARTMULA_\w+)`", " ".join(rows))
    assert sorted(listed) == sorted({item.metadata["variable"] for item in fields(Settings)} | _ELSEWHERE)


def test_the_configuration_page_gives_the_default_of_every_setting() -> None:
    rows = [[cell.strip() for cell in line.split("|")] for line in CONFIGURATION.read_text().splitlines()]
    written = {row[1].strip("`"): row[2].strip("`") for row in rows if len(row) > 4 and row[1].startswith("`HEART")}
    wrong = {}
    for item in fields(Settings):
        variable, default = item.metadata["variable"], item.default
        if variable not in written or not default:  # described in words
            continue
        text = str(default).lower() if isinstance(default, bool) else str(default).removesuffix(".0")
        if isinstance(default, tuple):
            text = "/".join(map(str, default))
        if written[variable] != text:
            wrong[variable] = (written[variable], text)
    assert wrong == {}


def test_the_readme_has_at_most_200_lines_and_links_every_page() -> None:
    assert len(README.read_text().splitlines()) <= 200
    linked = {(README.parent / path).resolve() for path, _ in links(README)}
    assert set(PAGES[1:]) - linked == set()


@EVERY_PAGE
def test_a_page_is_written_in_plain_terms(page: Path) -> None:
    text = page.read_text().lower()
    assert [word for word in FORBIDDEN if re.search(rf"\b{word}\b", text)] == []


@EVERY_PAGE
def test_a_page_does_not_describe_the_machine_on_which_it_was_written(page: Path) -> None:
    text = " ".join(page.read_text().lower().split())
    assert [phrase for phrase in LIMITS_OF_A_MACHINE if phrase in text] == []
