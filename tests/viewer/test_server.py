"""The page's server: who is answered, which bytes, and what a save says."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from data.folders import indexed, write_shards

from re2tal.data.building.annotations import read_annotations
from re2tal.runs.viewing import ViewOptions, find_videos, open_viewer
from re2tal.structures import Action
from re2tal.viewer.media import Media, NotSatisfiable, Span, parse_range
from re2tal.viewer.server import PAGE, ViewerServer

NASTY = '"><script>alert(1)</script>'
VIDEO = bytes(range(256)) * 40


@dataclass
class Client:
    """Requests to a server as its page sends them, unless a test says otherwise."""

    server: ViewerServer

    def ask(
        self, place: str, content: Any = None, *, method: str = "", path: str = "", **headers: str
    ) -> tuple[HTTPResponse, bytes]:
        port = self.server.server_address[1]
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        body = None if content is None else json.dumps(content)
        sent = {"Content-Type": "application/json"} if body else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("POST" if body else "GET"), path or f"/{self.server.token}/{place}", body, sent)
        answer = connection.getresponse()
        found = answer.read()
        connection.close()
        return answer, found

    def json(self, place: str, content: Any = None, *, status: int = 200) -> Any:
        answer, body = self.ask(place, content)
        assert answer.status == status, body
        return json.loads(body)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results on three videos, truth of two of them, and files of two."""
    (tmp_path / "videos").mkdir()
    for name in ("v.mp4", "new.mp4"):
        (tmp_path / "videos" / name).write_bytes(VIDEO)
    (tmp_path / "secret.mp4").write_bytes(b"hidden content")
    found = [{"segment": [1, 4], "label": "run", "score": 0.9}, {"segment": [6, 7], "label": NASTY, "score": 0.2}]
    (tmp_path / "results.json").write_text(json.dumps({"results": {"v": found, "new": found, NASTY: []}}))
    truth = {"subset": "validation", "duration": 10, "annotations": [{"segment": [1, 4], "label": "run"}]}
    other = truth | {"annotations": [{"segment": [2, 3], "label": "jump"}]}
    elsewhere = {"subset": "training", "duration": 5, "annotations": []}
    database = {"v.mp4": truth, "w": other, "x": elsewhere}
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    return tmp_path


@pytest.fixture
def client(folder: Path) -> Iterator[Client]:
    options = ViewOptions(videos=folder / "videos", annotations=folder / "annotations.json", port=0)
    yield from serve(folder / "results.json", options)


def serve(source: Path, options: ViewOptions) -> Iterator[Client]:
    with open_viewer(source, options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield Client(server)
        finally:
            server.shutdown()
            thread.join()


def test_the_list_tells_what_is_there_and_what_is_missing(client: Client) -> None:
    shown = client.json("api/videos")
    assert [video["id"] for video in shown["videos"]] == ["v", "new", NASTY, "w"]
    v, new, nasty, w = shown["videos"]
    assert v["types"] == {"true positive": 1, "background": 1}
    assert (new["types"], new["annotated"], nasty["predictions"]) == ({}, False, 0)
    assert w["types"] == {"missed": 1}
    assert [video["media"] for video in shown["videos"]] == [True, True, False, False]
    assert set(shown["classes"]) == {"run", NASTY, "jump"}
    assert any("not in the annotations: 2 videos (new, " in note for note in shown["notes"])
    assert any("Without a video file: 2 videos" in note for note in shown["notes"])


def test_a_video_has_its_predictions_and_types(client: Client) -> None:
    detail = client.json("api/video/0")
    assert detail["predictions"] == [[1.0, 4.0, 0.9, "run"], [6.0, 7.0, 0.2, NASTY]]
    assert detail["actions"] == [[1.0, 4.0, "run"]]
    assert (detail["types"], detail["missed"], detail["duration"]) == ([0, 5], [False], 10.0)
    assert client.json("api/types", {"video": 0, "actions": [[6, 7, NASTY]]}) == {"types": [5, 0], "missed": [False]}
    assert client.json("api/video/1")["types"] is None


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-0", Span(0, 0)),
        ("bytes=5-", Span(5, 99)),
        ("bytes=-10", Span(90, 99)),
        ("bytes=-1000", Span(0, 99)),
        ("bytes=90-1000", Span(90, 99)),
        ("bytes=9-3", None),
        ("bytes=-", None),
        ("bytes=0-1,4-5", None),
        ("lines=0-1", None),
    ],
)
def test_ranges(header: str | None, expected: Span | None) -> None:
    assert parse_range(header, 100) == expected


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=-0"])
def test_ranges_outside_of_the_file(header: str) -> None:
    with pytest.raises(NotSatisfiable):
        parse_range(header, 100)


def test_videos_come_whole_or_in_ranges(client: Client) -> None:
    answer, body = client.ask("media/0")
    assert (answer.status, body, answer.headers["Content-Type"]) == (200, VIDEO, "video/mp4")
    assert answer.headers["Accept-Ranges"] == "bytes"
    answer, body = client.ask("media/0", Range="bytes=300-401")
    assert (answer.status, body) == (206, VIDEO[300:402])
    assert answer.headers["Content-Range"] == f"bytes 300-401/{len(VIDEO)}"
    answer, body = client.ask("media/0", Range=f"bytes={len(VIDEO)}-")
    assert (answer.status, body, answer.headers["Content-Range"]) == (416, b"", f"bytes */{len(VIDEO)}")
    answer, body = client.ask("media/0", method="HEAD")
    assert (answer.status, body, answer.headers["Content-Length"]) == (200, b"", str(len(VIDEO)))
    assert client.ask("media/2")[0].status == 404


@pytest.mark.parametrize(
    "place",
    ["media/../secret.mp4", "media/%2e%2e/secret.mp4", "media/-1", "media/9", "../secret.mp4", "media//etc/passwd",
     "index.html", "../server.py", "media/v.mp4", "api/video/0/../1", "page/app.js"],
)  # fmt: skip
def test_nothing_but_what_is_listed_is_served(client: Client, place: str) -> None:
    answer, body = client.ask("", path=f"/{client.server.token}/{place}")
    assert answer.status == 404
    assert b"hidden content" not in body
    assert b"root:" not in body


def test_every_request_needs_the_token(client: Client) -> None:
    for place in (*PAGE, "api/videos", "api/state", "media/0"):
        assert client.ask(place)[0].status == 200
        for wrong in ("", "x" * len(client.server.token), client.server.token[:-1]):
            assert client.ask("", path=f"/{wrong}/{place}")[0].status == 404
    assert client.ask("", path="/")[0].status == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8642"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_other_sites_get_no_answer_even_if_they_know_the_token(client: Client, headers: dict[str, str]) -> None:
    assert client.ask("api/videos", **headers)[0].status == 403


def test_a_tunnel_from_another_port_works(client: Client) -> None:
    answer, _ = client.ask("api/videos", Host="localhost:9999", Origin="http://localhost:9999")
    assert answer.status == 200


def test_every_answer_forbids_what_the_page_does_not_need(client: Client) -> None:
    for place in ("", "app.js", "api/videos", "media/0", "nothing"):
        headers = client.ask(place)[0].headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"


def test_the_list_of_the_pages_files_is_whole() -> None:
    there = {one.name for one in (files("re2tal.viewer") / "page").iterdir()}
    assert there == {place or "index.html" for place in PAGE}


def test_the_page_asks_for_nothing_from_elsewhere(client: Client) -> None:
    for place in PAGE:
        text = client.ask(place)[1].decode()
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text


def change(video: int, base: list[Any], actions: list[Any]) -> dict[str, Any]:
    return {"video": video, "base": base, "actions": actions}


def test_corrections_are_saved_where_training_reads_them(client: Client, folder: Path) -> None:
    revision = client.json("api/videos")["revision"]
    edits = [change(0, [[1.0, 4.0, "run"]], [[1.5, 4.0, "run"], [6, 7, NASTY]])]
    saved = client.json("api/save", {"revision": revision, "edits": edits})
    assert saved["path"] == str(folder / "annotations.corrected.json")
    assert client.json("api/state")["revision"] == saved["revision"] != revision
    record = read_annotations(Path(saved["path"])).subset("validation")[0]
    assert [(one.start_seconds, one.label) for one in record.actions] == [(1.5, "run"), (6.0, NASTY)]
    assert client.json("api/videos")["videos"][0]["types"] == {"true positive": 2}


def test_a_second_viewer_is_told_and_can_merge(client: Client, folder: Path) -> None:
    revision = client.json("api/videos")["revision"]
    options = ViewOptions(annotations=folder / "annotations.json", port=0)
    for other in serve(folder / "results.json", options):
        theirs = change(3, [[2.0, 3.0, "jump"]], [])
        other.json("api/save", {"revision": other.json("api/state")["revision"], "edits": [theirs]})
    mine = [change(0, [[1.0, 4.0, "run"]], [])]
    refused = client.json("api/save", {"revision": revision, "edits": mine}, status=409)
    assert refused["both"] == []
    client.json("api/save", {"revision": refused["revision"], "edits": mine, "merge": True})
    database = json.loads((folder / "annotations.corrected.json").read_text())["database"]
    assert database["v.mp4"]["annotations"] == database["w"]["annotations"] == []


def test_where_nothing_can_be_written_the_edits_can_still_be_downloaded(folder: Path) -> None:
    options = ViewOptions(annotations=folder / "annotations.json", save_to=folder / "later" / "a.json", port=0)
    edits = [change(0, [[1.0, 4.0, "run"]], [[2, 3, "run"]])]
    for client in serve(folder / "results.json", options):
        (folder / "later").write_text("in the place of the folder")
        revision = client.json("api/state")["revision"]
        refused = client.json("api/save", {"revision": revision, "edits": edits}, status=507)
        assert "later" in refused["error"]
        document = client.json("api/download", {"edits": edits})["document"]
        assert document["database"]["v.mp4"]["annotations"] == [{"segment": [2.0, 3.0], "label": "run"}]
        assert len(document["database"]) == 3


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ([], 400),
        ({"edits": [1]}, 400),
        ({"edits": [{"video": 0}]}, 400),
        ({"revision": 1, "edits": []}, 400),
        ({"revision": "r", "edits": [{"video": 77, "base": [], "actions": []}]}, 404),
        ({"revision": "r", "edits": [{"video": "\u0661", "base": [], "actions": []}]}, 404),
        ({"revision": "r", "edits": [{"video": 0, "base": [], "actions": [[1, 2]]}]}, 400),
        ({"revision": "r", "edits": [{"video": 0, "base": [], "actions": [["x", 2, "a"]]}]}, 400),
        ({"revision": "r", "edits": [{"video": 2, "base": [], "actions": []}]}, 422),
    ],
)
def test_requests_that_the_page_never_sends_are_refused(client: Client, content: Any, status: int) -> None:
    assert "error" in client.json("api/save", content, status=status)


def test_a_form_of_another_site_cannot_save(client: Client) -> None:
    answer, _ = client.ask("api/save", {"revision": "r", "edits": []}, Content_Type="text/plain")
    assert answer.status == 415


def test_a_port_that_is_taken_is_named(client: Client, folder: Path) -> None:
    port = client.server.server_address[1]
    with pytest.raises(OSError, match=f"port {port} cannot be used .* --port 0 picks a free one"):
        open_viewer(folder / "results.json", ViewOptions(port=port))
    with pytest.raises(ValueError, match="--port is 99999; give a number from 0"):
        open_viewer(folder / "results.json", ViewOptions(port=99999))


def test_what_is_not_there_is_named(folder: Path) -> None:
    results = folder / "results.json"
    with pytest.raises(FileNotFoundError, match="gone does not exist; give the folder of a run"):
        open_viewer(folder / "gone", ViewOptions())
    with pytest.raises(FileNotFoundError, match=r"videos holds no results\.json"):
        open_viewer(folder / "videos", ViewOptions())
    with pytest.raises(ValueError, match="is not a folder"):
        open_viewer(results, ViewOptions(videos=results))
    with pytest.raises(FileNotFoundError, match=r"--annotations .*gone is not a file"):
        open_viewer(results, ViewOptions(annotations=folder / "gone"))
    with pytest.raises(ValueError, match="--tiou is 0"):
        open_viewer(results, ViewOptions(tiou=0))
    with pytest.raises(ValueError, match="--subset is"):
        open_viewer(results, ViewOptions(subset="a/b"))


def test_results_on_other_videos_say_so_and_are_not_called_wrong(folder: Path) -> None:
    found = [{"segment": [0, 1], "label": "run", "score": 0.5}]
    (folder / "results.json").write_text(json.dumps({"results": {"elsewhere": found}}))
    options = ViewOptions(annotations=folder / "annotations.json", port=0)
    with open_viewer(folder / "results.json", options) as server:
        assert [video.video_id for video in server.catalog.videos] == ["elsewhere"]
        assert server.catalog.notes[0] == "None of the predicted videos is in the annotations: 1 video (elsewhere)."
        assert server.catalog.summary()["videos"][0]["types"] == {}


def test_predictions_without_classes_are_right_or_wrong_by_their_times_alone(folder: Path) -> None:
    """All predictions of a class-agnostic detector were called wrong labels, and all true actions missed."""
    rows = [{"segment": segment, "label": "action", "score": 0.5} for segment in ([1, 4], [8, 9])]
    (folder / "results.json").write_text(json.dumps({"results": {"v": rows}}))
    with open_viewer(folder / "results.json", ViewOptions(annotations=folder / "annotations.json", port=0)) as server:
        catalog = server.catalog
    assert catalog.summary()["videos"][0]["types"] == {"true positive": 1, "background": 1}
    assert "The predictions have no classes (all are 'action'), so a true action of any is right." in catalog.notes


def test_a_run_without_usable_shards_is_shown_without_truth(folder: Path) -> None:
    (folder / "config.json").write_text('{"data": {"shards": "nowhere"}}')
    with open_viewer(folder, ViewOptions(port=0)) as server:
        assert server.catalog.notes[0].startswith("The run's validation shards are not used: nowhere")


def test_a_run_shows_the_videos_and_the_truth_of_its_shards(tmp_path: Path) -> None:
    videos = {
        name: (content, indexed(90, video_id=name, actions=[Action(0.5, 1.5, "run")]))
        for name, content in (("first", VIDEO), ("second", VIDEO[::-1]))
    }
    write_shards(tmp_path / "shards" / "validation", videos, per_shard=2, classes=("run",))
    (tmp_path / "config.json").write_text(json.dumps({"data": {"shards": str(tmp_path / "shards")}}))
    found = [{"segment": [0.5, 1.5], "label": "run", "score": 0.9}]
    (tmp_path / "results.json").write_text(json.dumps({"results": {"second": found}}))
    for client in serve(tmp_path, ViewOptions(port=0)):
        shown = client.json("api/videos")
        assert [(video["id"], video["types"]) for video in shown["videos"]] == [
            ("second", {"true positive": 1}),
            ("first", {"missed": 1}),
        ]
        answer, body = client.ask("media/0", Range="bytes=100-299")
        assert (answer.status, body, answer.headers["Content-Type"]) == (206, VIDEO[::-1][100:300], "video/mp4")
        assert client.ask("media/1")[1] == VIDEO
        saved = client.json("api/save", {"revision": shown["revision"], "edits": [change(0, [[0.5, 1.5, "run"]], [])]})
        assert Path(saved["path"]) == tmp_path / "annotations.corrected.json"
    assert len(read_annotations(tmp_path / "annotations.corrected.json").subset("training")) == 2


def test_a_damaged_shard_gives_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 2048)
    with (tmp_path / "a.tar").open("rb") as file, pytest.raises(ValueError, match=r"a\.tar holds no video at byte 512"):
        Media(tmp_path / "a.tar", 512).name_and_bytes(file)


def test_files_with_one_id_are_told(folder: Path) -> None:
    (folder / "videos" / "sub").mkdir()
    (folder / "videos" / "sub" / "v.mkv").write_bytes(b"")
    found, notes = find_videos(folder / "videos")
    assert set(found) == {"v", "new"}
    assert "1 files have the id of another" in notes[0]


def test_entries_that_differ_by_their_suffix_are_videos_of_their_own(folder: Path) -> None:
    document = json.loads((folder / "annotations.json").read_text())
    entries = document["database"]
    entries |= {"v": entries["v.mp4"], "v.mp4": entries["w"], "w.mov": entries["w"], "w.avi": entries["x"]}
    (folder / "annotations.json").write_text(json.dumps(document))
    with open_viewer(folder / "results.json", ViewOptions(annotations=folder / "annotations.json", port=0)) as server:
        keys = {video.video_id: video.key for video in server.catalog.videos}
        # The predictions for "v" are compared with its own actions, and corrections of "v" go there.
        assert {name: keys[name] for name in ("v", "v.mp4", "w", "w.mov")} == {
            name: name for name in ("v", "v.mp4", "w", "w.mov")
        }
        assert server.catalog.summary()["videos"][0]["types"]["true positive"] == 1


def test_earlier_corrections_stand_in_for_the_annotations_and_say_so(folder: Path) -> None:
    annotations = folder / "annotations.json"
    options = ViewOptions(annotations=annotations, port=0)
    (folder / "annotations.corrected.json").write_text('{"database": {"v": {"subset": "test", "annotations": []}}}')
    os.utime(folder / "annotations.corrected.json", (1, 1))
    with open_viewer(folder / "results.json", options) as server:
        assert server.catalog.summary()["videos"][0]["truths"] == 0
        assert f"{annotations} is newer, and is not looked at" in server.catalog.notes[0]


def test_corrections_of_other_files_in_the_folder_are_left_alone(folder: Path) -> None:
    def saves_to(source: Path, **options: Path) -> str:
        with open_viewer(source, ViewOptions(port=0, **options)) as server:
            return server.catalog.annotations.save_to.relative_to(folder).as_posix()

    (folder / "other.json").write_text('{"database": {"v": {"subset": "test", "annotations": []}}}')
    assert saves_to(folder / "results.json", annotations=folder / "other.json") == "other.corrected.json"
    assert saves_to(folder / "results.json") == "results.annotations.json"
    assert saves_to(folder) == "annotations.corrected.json"
    assert saves_to(folder, save_to=folder / "mine.json") == "mine.json"


def test_no_call_of_the_page_gets_an_argument_for_each_video() -> None:
    # A browser takes some 100,000 arguments at most.
    scripts = [one for one in files("re2tal.viewer").joinpath("page").iterdir() if one.name.endswith(".js")]
    assert len(scripts) > 5
    assert not [path.name for path in scripts if re.search(r"Math\.(max|min)\([^\n]*\.\.\.", path.read_text("utf-8"))]
