import dataclasses
import json

import pytest

from cm_diffusers.evaluation import Protocol, Report, Result

PROTOCOL = Protocol("inception", "abcd", "3 x 8 x 8, 8 bits", 1000, "cifar10/train", "ef01", 50_000)
OF_TEXT = dataclasses.replace(PROTOCOL, prompts="9 of p.txt", prompts_digest="23", clip="me/clip", clip_digest="45")


def result(model="student", nfe=1, fid=3.0, protocol=PROTOCOL, repetitions=1, sampler="multistep", weights="12"):
    found = [{"fid": fid + shift, "kid": 0.1} for shift in range(repetitions)]
    return Result.over(
        found, model=model, sampler=sampler, nfe=nfe, seconds_per_1000=2.0, protocol=protocol, weights=weights
    )


def test_repetitions_give_a_mean_and_a_spread():
    many = result(repetitions=3)
    assert many.metrics["fid"] == pytest.approx(4)
    assert many.spread["fid"] == pytest.approx(1)
    assert (many.text("fid"), many.text("kid"), many.text("recall")) == ("4 ± 1", "0.1 ± 0", "-")
    assert result().spread == {}
    assert result().text("fid") == "3"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Protocol)])
def test_other_protocols_stay_out_of_the_table(name):
    report = Report([result(protocol=OF_TEXT)])
    other = dataclasses.replace(OF_TEXT, **{name: getattr(OF_TEXT, name) * 2})
    with pytest.raises(ValueError, match=f"cannot stand in one table: {name}: "):
        report.add(result(nfe=2, protocol=other))


def test_the_table_names_its_protocol_and_is_sorted():
    report = Report()
    for nfe in (4, 1, 2):
        report.add(result(nfe=nfe, fid=10 / nfe))
    report.add(result("teacher", nfe=35))
    lines = report.table().splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:6]] == ["1", "2", "4", "35"]
    assert lines[0].startswith("| model | sampler | NFE | FID ↓ | KID ↓ |")
    assert lines[-1].startswith(
        "1,000 images (3 x 8 x 8, 8 bits) against 50,000 of cifar10/train, features: inception"
    )
    assert Report().table() == ""


def test_the_table_of_images_of_text_names_prompts_and_clip():
    last = Report([result(protocol=OF_TEXT)]).table().splitlines()[-1]
    assert last.endswith("inception [abcd], prompts: 9 of p.txt [23], CLIP: me/clip [45].")
    assert "prompts" not in PROTOCOL.facts() and OF_TEXT.facts()["clip"] == "me/clip"


def test_reports_from_before_there_was_text_are_read(tmp_path):
    Report([result()]).save(tmp_path / "report.json")
    entries = json.loads((tmp_path / "report.json").read_text())
    for name in ("prompts", "prompts_digest", "clip", "clip_digest"):
        del entries[0]["protocol"][name]
    (tmp_path / "report.json").write_text(json.dumps(entries))
    assert Report.load(tmp_path / "report.json").protocol == PROTOCOL


def test_a_figure_that_is_measured_again_replaces_the_old():
    report = Report([result(fid=3.0)])
    report.add(result(fid=2.0))
    assert [r.metrics["fid"] for r in report.results] == [2.0]
    report.add(result(sampler="another"))
    assert len(report.results) == 2


def test_two_students_are_not_mixed():
    report = Report([result(nfe=1), result(nfe=2), result("teacher", weights="78")])
    with pytest.raises(ValueError, match="has figures of another student, with other weights"):
        report.add(result(nfe=1, weights="34"))
    assert len(report.results) == 3


def test_names_cannot_break_the_table():
    bad = "a|b <img src=x>\n![c](https://d)"
    protocol = dataclasses.replace(PROTOCOL, reference=bad, features=bad)
    lines = Report([result(bad, sampler=bad, protocol=protocol)]).table().splitlines()
    assert len(lines) == 5
    shown = r"a\|b \<img src=x\> !\[c\](https://d)"
    assert lines[2].startswith(f"| {shown} | {shown} | 1 |")
    assert f"of {shown}, features: {shown} [abcd]" in lines[4]


def test_a_report_is_written_whole(tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    Report([result()]).save(file)
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)  # the run is killed before it has all
    with pytest.raises(ZeroDivisionError):
        Report([result(fid=9.0)]).save(file)
    assert Report.load(file) == Report([result()])


def test_a_report_survives_its_file(tmp_path):
    report = Report([result(repetitions=2), result("teacher", nfe=35)])
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


@pytest.mark.parametrize("content", ["", "{}x", '[{"model": 1}]', "[3]"])
def test_what_is_no_report_is_refused(content, tmp_path):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match="holds no evaluation"):
        Report.load(tmp_path / "report.json")
