"""Show predictions and annotations beside their videos on a local page, and save corrections."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from re2tal.config import load_config
from re2tal.data.addresses.address import as_address
from re2tal.data.building.named_files import videos_in
from re2tal.data.building.probe import probe_video
from re2tal.data.contract.shards import FeatureSet, ShardSet, open_any, subset_folder
from re2tal.evaluation.results import read_results
from re2tal.files import linked, output_file
from re2tal.runs.folder import CONFIG_NAME, RESULTS_NAME
from re2tal.structures import VideoRecord
from re2tal.video_ids import VIDEO_SUFFIXES, composed
from re2tal.viewer.annotation_file import AnnotationFile
from re2tal.viewer.catalog import make_catalog
from re2tal.viewer.media import Media
from re2tal.viewer.server import ViewerServer

CORRECTED_NAME = "annotations.corrected.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewOptions:
    """What the page shows beside the predictions, and where it saves."""

    videos: Path | None = None
    """Folder of the video files, subfolders too; ids are names of files without suffix. By default those in the
    validation shards of a run."""
    annotations: Path | None = None
    """True actions, in ActivityNet's layout; by default those in the validation shards of a run."""
    save_to: Path | None = None
    """File for the corrections; the page goes on from it if it exists. By default NAME.corrected.json beside the
    annotations NAME.json, annotations.corrected.json in a run, NAME.annotations.json beside other results."""
    subset: str = "training"
    """Subset of corrected videos that the annotations don't name yet."""
    tiou: float = 0.5
    """From which temporal IoU on a prediction counts as right."""
    port: int = 8642
    """Port on 127.0.0.1; 0 picks a free one."""


AS_USUAL = ViewOptions()


def open_viewer(source: Path, options: ViewOptions = ViewOptions()) -> ViewerServer:
    """A server of the page, ready to `serve_forever`; `source` is a run's folder or a results JSON.

    Raises ValueError and OSError for files that are not there or not usable, and for a port that is taken.
    """
    if not 0 < options.tiou <= 1:
        raise ValueError(f"--tiou is {options.tiou:g}; give a number above 0 and up to 1")
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port is {options.port}; give a number from 0 (which picks a free one) to 65535")
    for name, given in (("", source), ("--videos ", options.videos), ("--annotations ", options.annotations)):
        if given is not None and (address := as_address(given)) is not None:
            raise ValueError(f"{name}{address}: the page shows files of this machine; copy it here, and give its path")
    if options.annotations is not None and not options.annotations.is_file():
        raise FileNotFoundError(f"--annotations {options.annotations} is not a file; check the path")
    path = _results_path(source)
    results = read_results(path)
    files, notes = (None, []) if options.videos is None else find_videos(options.videos)
    records: Sequence[VideoRecord] = ()
    if source.is_dir() and None in (options.annotations, files):
        shards, faults = _shards_of(source)
        notes += faults
        records = [video.record for video in shards.videos] if shards and options.annotations is None else ()
        if files is None and (packed := _packed(shards)):
            files = packed
            notes.append("The videos are those of the run's shards; --videos FOLDER shows the originals.")
    annotations = AnnotationFile(
        output_file(options.save_to, option="--save-to")
        if options.save_to is not None
        else linked(_save_to(source, path, options.annotations)),
        source=options.annotations,
        records=records,
        subset=options.subset,
    )
    notes += _earlier(annotations)
    catalog = make_catalog(
        source.resolve().name if source.is_dir() else f"{source.resolve().parent.name}/{source.name}",
        results,
        annotations,
        files=files,
        tiou=options.tiou,
        notes=notes,
        measure=lambda video: float(probe_video(video, max_missing=1.0).duration_seconds),
    )
    return ViewerServer(catalog, port=options.port)


def view(source: Path, options: ViewOptions, *, open_page: bool) -> None:
    """Serve the page until the keyboard stops it."""
    with open_viewer(source, options) as server:
        catalog = server.catalog
        number = len(catalog.videos)
        print(f"{number} video{'s' * (number != 1)} on {server.address}", flush=True)
        for note in catalog.notes:
            print(f"note: {note}")
        if open_page and not _open_browser(server.address):
            port = server.server_address[1]
            print(
                f"no browser here: open the address; from another machine after `ssh -L {port}:127.0.0.1:{port} HOST`"
            )
        print("stop with Ctrl-C; unsaved corrections are in the page", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def find_videos(folder: Path) -> tuple[dict[str, Media], list[str]]:
    """(id -> file, notes) of all video files below a folder; ValueError if there is none.

    Of files with one id the first by path is taken, and a note names one of the others.
    """
    files: dict[str, Media] = {}
    twice = []
    for path in videos_in(folder)[0]:
        if files.setdefault(composed(path.stem), Media(path)).path != path:
            twice.append(path)
    if not files:
        raise ValueError(f"--videos {folder} holds no video file; wanted one of {', '.join(VIDEO_SUFFIXES)}")
    notes = [f"{len(twice)} files have the id of another and are not shown, such as {twice[0]}."] if twice else []
    return files, notes


def _results_path(source: Path) -> Path:
    if not source.is_dir():
        if not source.exists():
            raise FileNotFoundError(f"{source} does not exist; give the folder of a run, or a results JSON")
        return source
    path = source / RESULTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{source} holds no {RESULTS_NAME}: training writes it when it evaluates, and `re2tal detect` writes one; "
            "give such a file"
        )
    return path


def _save_to(source: Path, results: Path, annotations: Path | None) -> Path:
    """A name of its own for each file of annotations or results: corrections of another are never taken for these."""
    if annotations is not None:
        return annotations.with_name(f"{annotations.stem}.corrected.json")
    return source / CORRECTED_NAME if source.is_dir() else results.with_name(f"{results.stem}.annotations.json")


def _earlier(annotations: AnnotationFile) -> list[str]:
    """A note where earlier corrections stand in for the annotations."""
    source, save_to = annotations.source, annotations.save_to
    if not save_to.exists() or (source is not None and source.samefile(save_to)):
        return []
    note = f"The true actions are those of {save_to}, which holds earlier corrections"
    if source is not None and source.stat().st_mtime > save_to.stat().st_mtime:
        return [f"{note}; {source} is newer, and is not looked at: move the corrections away to begin anew."]
    return [f"{note}."]


def _shards_of(run: Path) -> tuple[ShardSet | FeatureSet | None, list[str]]:
    """A run's validation shards, or a note where they cannot be used."""
    try:
        config = load_config(run / CONFIG_NAME)
        opened = open_any(subset_folder(config.data.shards, config.data.validation_subset))
        opened.path(opened.manifest.shards[0].name)  # an error where they are not on this machine
        return opened, []
    except (ValueError, OSError) as error:
        return None, [f"The run's validation shards are not used: {error}"]


def _packed(shards: ShardSet | FeatureSet | None) -> dict[str, Media]:
    """Id -> its video in the shards; nothing where they hold features."""
    if not isinstance(shards, ShardSet):
        return {}
    return {composed(video.record.video_id): Media(shards.path(video.shard), video.offset) for video in shards.videos}


def _open_browser(address: str) -> bool:
    """Whether a browser was started; a text browser would take the terminal."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    return webbrowser.open(address)
