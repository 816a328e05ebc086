"""The reproduction: what is done is left alone, what crashes is reported and the rest goes on, the report says it all.

Three invented experiments under the names of real ones; in a process of its own each does what an environment variable
asks for.
"""

from __future__ import annotations

import dataclasses
import html.parser
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import matplotlib.figure
import numpy as np
import pytest
import rich.console
import rich.table
import xarray as xr

from experiments import __main__ as commands
from experiments import command, registry, report, reproduction, results
from experiments.claims import Check, Claim

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("bounds", "retention", "lyapunov_gates")
QUIET = rich.console.Console(quiet=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings."""

    size: int = 5
    """A number."""


def invented(name: str) -> command.Experiment:
    """An experiment whose claim holds where the value is at most 1."""
    claim = {"bounds": "A1", "retention": "B3", "lyapunov_gates": "E5"}[name]

    def reason():
        raise RuntimeError("the reason of <it> & all")

    def run(config, *, parts=None, screen=None):
        def piece(index):
            if os.environ.get(f"INVENTED_{name}") == "sleep" and index:
                time.sleep(60)
            with (Path(os.environ["INVENTED_FOLDER"]) / f"{name}.ran").open("a") as file:
                file.write(str(index))
            return xr.Dataset({"x": ("seed", np.full(3, float(os.environ.get("INVENTED_VALUE", "0.5"))))})

        behaviour = os.environ.get(f"INVENTED_{name}")
        if behaviour == "raise":  # inside jax, which ends its tracebacks with a remark of its own
            jax.jit(lambda x: reason())(1.0)
        if behaviour == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        pieces = [command.Piece(f"{name}-{i}", f"piece {i}", lambda i=i: piece(i)) for i in range(2)]
        dataset = xr.concat(command.measure(pieces, parts=parts, screen=screen), dim="piece")
        for statistic in ("median", "low", "high"):
            dataset[f"x_{statistic}"] = dataset["x"].median("seed")
        return dataset.assign_attrs(command.provenance(name, config, seconds=1.0))

    def verdict(dataset):
        value = float(dataset["x"].max())
        return [Check("x", f"{value:g}", "≤ 1", value <= 1, claim, "by <definition>")]

    def table(dataset):
        shown = rich.table.Table("what", "x [low, high]", title="Invented")
        shown.add_row("[bold]x[/bold]", f"{float(dataset['x'].max()):g}")
        return shown

    def figure(dataset):
        if os.environ.get(f"INVENTED_{name}") == "picture":
            raise KeyError("no such curve")
        drawn = matplotlib.figure.Figure(figsize=(2, 1))
        drawn.subplots().plot(dataset["x"].values.ravel())
        return drawn

    claims = (
        Claim(claim, f"x < 2 in {name}", "nobody", "x = 0.5", "x > 1", ("rg.unroll",), ("tests/test_claims.py",)),
    )
    return command.Experiment(
        name,
        f"Is x small in {name}?",
        claims,
        Config(),
        Config(size=1),
        run,
        table,
        verdict,
        lambda dataset: {claim: f"x is {float(dataset['x'].max()):g}."},
        (command.Picture("", "The values of x.", figure),),
    )


@pytest.fixture
def three(tmp_path, monkeypatch):
    """The invented experiments in place of all; returns the folder."""
    monkeypatch.setattr(registry, "NAMES", NAMES)
    monkeypatch.setattr(registry, "experiments", lambda names=NAMES: [invented(name) for name in names])
    monkeypatch.setattr(
        reproduction, "program", lambda name: [sys.executable, "-m", "tests.test_reproduction", f"--invented={name}"]
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("INVENTED_FOLDER", str(tmp_path))
    return tmp_path / "out"


def run_all(folder, **options):
    return reproduction.reproduce(NAMES, folder, smoke=False, jobs=2, screen=options.get("screen", QUIET))


def states(done):
    return [at.state for at in done.standings]


def times_run(folder, name):
    file = folder.parent / f"{name}.ran"
    return file.read_text() if file.exists() else ""


@pytest.mark.slow  # a dozen processes
def test_a_crash_is_reported_and_the_rest_goes_on(three, monkeypatch, capsys):
    monkeypatch.setenv("INVENTED_bounds", "raise")
    monkeypatch.setenv("INVENTED_retention", "kill")
    assert commands.main(["all", "--out", str(three)]) == 1
    out, err = capsys.readouterr()
    assert "no result of bounds, retention" in err
    page = (three / "report.html").read_text(encoding="utf-8")
    assert "RuntimeError: the reason of &lt;it&gt; &amp; all" in page
    assert "killed by signal 9" in page
    assert "This report is not whole" in page
    assert "x is 0.5." in page  # of the third
    assert "RuntimeError" in (three / "logs" / "bounds.log").read_text()
    # what crashed is tried again, what is done is not
    monkeypatch.delenv("INVENTED_bounds")
    monkeypatch.delenv("INVENTED_retention")
    assert commands.main(["all", "--out", str(three)]) == 0
    out = capsys.readouterr().out
    assert "lyapunov_gates: done before with these settings and sources" in out
    assert [times_run(three, name) for name in NAMES] == ["01", "01", "01"]
    page = (three / "report.html").read_text(encoding="utf-8")
    assert "not whole" not in page
    assert not list(three.rglob("*.failed"))


@pytest.mark.slow  # a dozen processes
def test_a_picture_that_fails_takes_nothing_along_and_the_claim_is_tried_again(three, monkeypatch, capsys):
    monkeypatch.setenv("INVENTED_bounds", "picture")
    assert commands.main(["all", "--out", str(three)]) == 1
    page = (three / "report.html").read_text(encoding="utf-8")
    assert "A picture could not be shown: KeyError" in page
    assert "What follows is the older result." in page
    assert page.count("<img") == 2
    # also after the record of the failure is gone: without its picture a result is not finished
    (three / "logs" / "bounds.failed").unlink()
    monkeypatch.delenv("INVENTED_bounds")
    assert states(run_all(three)) == ["done", "done before", "done before"]
    assert (three / "bounds.png").exists()


def test_a_note_of_a_crash_counts_until_the_result_is_made_anew(three):
    """Whoever made it: another machine, or its own command; a later crash of another experiment changes nothing."""
    command.execute(invented("bounds"), Config(), command.Options(out=three))
    (three / "logs").mkdir()
    note = three / "logs" / "bounds.failed"
    note.write_text("the reason", encoding="utf-8")
    made = (three / "bounds.nc").stat().st_mtime
    os.utime(note, (made + 1, made + 1))
    at = reproduction.standing(invented("bounds"), three)
    assert (at.state, at.reason) == ("crashed", "the reason")
    os.utime(note, (made - 1, made - 1))
    (three / "logs" / "retention.failed").write_text("another reason", encoding="utf-8")
    assert reproduction.standing(invented("bounds"), three).state == "done"


@pytest.mark.slow  # processes of processes
def test_two_machines_share_a_reproduction(three):
    """Two drivers with one folder: what one is at is left to it, or joined at the end; all is made once."""
    words = [sys.executable, "-m", "tests.test_reproduction", "--all", "--jobs", "1", "--out", str(three)]
    both = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [sorted(times_run(three, name)) for name in NAMES] == [["0", "1"]] * 3, said
    assert not list(three.glob(".parts-*"))
    assert not list(three.rglob("*.failed"))
    assert "not whole" not in (three / "report.html").read_text(encoding="utf-8")


def test_smoke_does_not_replace_full_results(three, capsys):
    command.execute(invented("bounds"), Config(), command.Options(out=three))
    with pytest.raises(SystemExit) as stopped:
        commands.main(["all", "--smoke", "--only", "A1", "--out", str(three)])
    assert stopped.value.code == 2
    assert "holds full results, which --smoke would replace" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["list"], ["report"]])
def test_a_folder_that_is_not_there_is_one_line(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main([*words, "--results", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert "expected a folder with results" in capsys.readouterr().err


def test_a_foreign_file_is_no_verdict(three):
    three.mkdir()
    results.save(xr.Dataset().assign_attrs(experiment="bounds"), three / "bounds.nc")
    at = reproduction.standing(invented("bounds"), three)
    assert at.state == "crashed"
    assert "KeyError" in at.reason


@pytest.mark.slow  # a dozen processes
def test_what_was_made_with_other_settings_or_sources_is_made_again(three, monkeypatch):
    assert states(run_all(three)) == ["done"] * 3
    for name, change in (("bounds", {"config": '{"size": 6}'}), ("retention", {"source_digest": "0"})):
        file = three / f"{name}.nc"
        results.save(results.load(file, experiment=name).assign_attrs(change), file)
    (three / "lyapunov_gates.nc").write_bytes(b"half")
    before = [reproduction.standing(invented(name), three) for name in NAMES]
    assert [at.state for at in before] == ["other settings", "older sources", "crashed"]
    assert "is not a readable netCDF file" in before[2].reason
    assert states(run_all(three)) == ["done"] * 3
    assert [times_run(three, name) for name in NAMES] == ["0101"] * 3


@pytest.mark.slow  # a dozen processes
def test_an_interruption_loses_one_piece_at_the_most(three, monkeypatch):
    """The whole command under SIGINT, as from the keyboard; then again without it."""
    words = [sys.executable, "-m", "tests.test_reproduction", "--all", "--out", str(three)]
    environment = {**os.environ, "INVENTED_retention": "sleep"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (three / "bounds.nc").exists() or not list(three.glob(".parts-*/retention-0.nc")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)  # into the second piece, which takes a minute
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted: finished experiments and parts are kept, the same command resumes" in err
    assert "This report is not whole" in (three / "report.html").read_text(encoding="utf-8")
    again = subprocess.run(words, env={**os.environ}, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert times_run(three, "retention") == "01"  # the first piece was kept
    assert times_run(three, "bounds") == "01"


def test_smoke_is_another_configuration_and_says_so(three):
    assert commands.main(["all", "--smoke", "--only", "A1", "--out", str(three)]) == 0
    page = (three / "report.html").read_text(encoding="utf-8")
    assert "A smoke run" in page
    assert json.loads(results.load(three / "bounds.nc", experiment="bounds").attrs["config"]) == {"size": 1}
    assert reproduction.standing(invented("bounds"), three).state == "other settings"
    assert "retention" in page
    assert "not run yet" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["all", "--only", "Z9"], "unknown experiment 'Z9'; expected some of: bounds"),
        (["all", "--jobs", "0"], "--jobs: expected at least 1, found 0"),
    ],
)
def test_user_errors_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main([*words, "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_folder_that_cannot_be_written_is_one_line(three, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        commands.main(["all", "--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert "is not writable" in capsys.readouterr().err


def test_agreement_with_what_is_stored(three, tmp_path, monkeypatch):
    run_all(three)
    first = reproduction.standing(invented("bounds"), three)
    assert report.against(first, first) == report.Agreement({"A1": True}, 2, 0, 0.0)
    moved = lambda by: first._replace(dataset=first.dataset.assign(x_median=first.dataset["x_median"] + by))
    margin = (report.ABSOLUTE + report.RELATIVE) * 0.5  # the stored interval has no width, the largest median is 0.5
    assert report.against(moved(0.9 * margin), first).num_outside == 0
    outside = report.against(moved(1.1 * margin), first)
    assert (outside.num_outside, round(outside.largest, 6)) == (2, round(1.1 * margin, 6))
    assert report.against(moved(np.nan), first).num_outside == 2
    assert report.against(moved(-np.inf), first).num_outside == 2
    refuted = first._replace(verdicts=(first.verdicts[0]._replace(word="does not hold"),))
    assert report.against(refuted, first).same_words == {"A1": False}
    other = first._replace(dataset=first.dataset.assign_attrs(config="{}"))
    assert report.against(other, first) is None


class _Page(html.parser.HTMLParser):
    """Collects ids, links and pictures, and whether elements are closed in order."""

    VOID = ("meta", "img", "link", "br", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.sources, self.alts = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.sources += [attrs["src"]] if "src" in attrs else []
        self.alts += [attrs.get("alt")] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_stands_alone_and_is_well_formed(three, monkeypatch):
    monkeypatch.setenv("INVENTED_VALUE", "3")
    done = run_all(three)
    stored = {at.experiment.name: at for at in done.standings}
    page = report.render(done.standings, command="python -m experiments all", stored=stored)
    parsed = _Page()
    parsed.feed(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link.removeprefix("#") for link in parsed.links} <= set(parsed.ids)  # nothing from elsewhere
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert parsed.alts == ["The values of x."] * 3
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert "@media (max-width" in page
    # the verdict table comes first, in the order of the claims
    assert page.index('id="verdicts"') < page.index('id="bounds"') < page.index('id="retention"')
    assert re.findall(r'<a href="#(\w+)"><b>', page) == ["A1", "B3", "E5"]
    assert page.count("does not hold</span>") == 6  # in the table, and again at each claim
    assert "by &lt;definition&gt;" in page
    assert "Again by" in page
    assert "source digest" in page


def test_list_shows_every_claim(three, capsys):
    run_all(three)
    assert commands.main(["list", "--results", str(three)]) == 0
    out = capsys.readouterr().out
    for word in ("A1", "B3", "E5", "holds", "lyapunov_gates"):
        assert word in out
    assert commands.main(["report", "--results", str(three), "--out", str(three / "r.html")]) == 0
    assert "x is 0.5." in (three / "r.html").read_text(encoding="utf-8")


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    if first == "--all":
        registry.NAMES = NAMES
        registry.experiments = lambda names=NAMES: [invented(name) for name in names]
        reproduction.program = lambda name: [sys.executable, "-m", "tests.test_reproduction", f"--invented={name}"]
        sys.exit(commands.main(["all", *rest]))
    command.main(invented(first.removeprefix("--invented=")), rest)
