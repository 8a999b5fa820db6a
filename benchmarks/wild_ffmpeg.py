"""Odd but sound files for `wild.py` that the program ffmpeg writes, and what it shows of them; none without it."""

from __future__ import annotations

import shutil
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
from wild_files import HEIGHT, WIDTH, Shown, numbers_in, patches, picture

NUM_FRAMES = 60
_X264 = "-c:v libx264 -crf 6 -preset veryfast -pix_fmt yuv420p"
_X265 = "-c:v libx265 -crf 6 -preset ultrafast -x265-params log-level=none"
_VP9 = "-c:v libvpx-vp9 -crf 6 -b:v 0 -cpu-used 5"
_MPEG2 = "-c:v mpeg2video -q:v 1 -pix_fmt yuv420p"
_SOUND = "-f lavfi -i sine=r=44100:d=2"
_PHONE = "-vf setpts=(N*0.0333+0.011*sin(N)+0.2*gte(N\\,30))/TB -fps_mode vfr"
_LATE = "-c:a aac -filter:v setpts=PTS+0.7/TB"
_TWO = "-filter_complex [0:v]split[a][b];[b]negate[c]"

KINDS = {
    "fields.mpg": f"-r 25 -vf setfield=tff {_MPEG2} -flags +ildct+ilme -bf 2 -top 1",
    "alternate.vob": f"{_MPEG2} -flags +ildct+ilme -alternate_scan 1 -bf 2",
    "telecine.ts": f"-r 24000/1001 -vf telecine {_MPEG2} -flags +ildct+ilme",
    "mpeg1.mpg": "-r 25 -c:v mpeg1video -q:v 1 -bf 2 -pix_fmt yuv420p",
    "dvd.vob": "-r 25 -vf scale=720:576 -target pal-dvd -an",
    "paff.ts": f"{_X264} -x264-params interlaced=1:tff=1",
    **{f"mbaff.{suffix}": f"{_X264} -flags +ildct+ilme -x264-params tff=1" for suffix in ("mp4", "mkv", "ts")},
    "fake-interlaced.mp4": f"{_X264} -x264-params fake-interlaced=1",
    "pulldown.mp4": f"{_X264} -x264-params pulldown=32:force-cfr=1 -r 24",
    "vbv.mp4": "-c:v libx264 -b:v 3M -maxrate 3M -bufsize 3M -x264-params nal-hrd=vbr -pix_fmt yuv420p",
    "grain.mp4": "-c:v libsvtav1 -crf 12 -preset 10 -svtav1-params film-grain=10 -pix_fmt yuv420p",
    "aom.mkv": "-c:v libaom-av1 -crf 8 -b:v 0 -cpu-used 8 -lag-in-frames 19 -auto-alt-ref 1 -pix_fmt yuv420p",
    "hidden.webm": "-c:v libvpx -b:v 4M -auto-alt-ref 1 -lag-in-frames 16 -arnr-maxframes 7 -pix_fmt yuv420p",
    "hidden.mp4": f"{_VP9} -auto-alt-ref 1 -lag-in-frames 25 -pix_fmt yuv420p",
    "ten.webm": f"{_VP9} -pix_fmt yuv420p10le",
    "444.webm": f"{_VP9} -pix_fmt yuv444p",
    "alpha8.webm": "-pix_fmt yuva420p -c:v libvpx -b:v 4M -auto-alt-ref 0",
    "alpha9.webm": f"-pix_fmt yuva420p {_VP9} -auto-alt-ref 0",
    "prores444.mov": "-c:v prores_ks -profile:v 4444 -pix_fmt yuva444p10le",
    "dnxhr.mov": "-vf scale=640:480:flags=neighbor -c:v dnxhd -profile:v dnxhr_hq -pix_fmt yuv422p",
    "mjpeg422.mov": "-c:v mjpeg -q:v 1 -pix_fmt yuvj422p",
    "png.mov": "-c:v png",
    "huffyuv.avi": "-c:v huffyuv",
    "raw.avi": "-c:v rawvideo -pix_fmt bgr24",
    "dv.avi": "-vf scale=720:576:flags=neighbor -r 25 -c:v dvvideo",
    "422.mov": f"{_X264}10le".replace("420", "422"),
    "hevc-444.mkv": f"{_X265} -pix_fmt yuv444p12le",
    "hevc-fields.ts": f"{_X265}:interlace=tff -pix_fmt yuv420p",
    "pq.mp4": f"{_X265}:colormatrix=bt2020nc:transfer=smpte2084 -pix_fmt yuv420p10le -colorspace bt2020nc",
    "hlg.mkv": f"{_X265}:colormatrix=bt2020nc:transfer=arib-std-b67 -pix_fmt yuv420p10le -colorspace bt2020nc",
    "untagged-hd.mp4": f"{_X264} -vf scale=1280:720:flags=neighbor",
    "sar.mpg": f"-r 25 -vf setsar=16/15 {_MPEG2}",
    "aspect.mkv": f"{_X264} -aspect 16:9",
    "odd-size.webm": f"{_VP9} -vf scale=161:121:flags=neighbor -pix_fmt yuv420p",
    "one.webm": f"-frames:v 1 {_VP9} -pix_fmt yuv420p",
    "one.ts": f"-frames:v 1 {_X264}",
    "fps120.mp4": f"{_X264} -vf setpts=N/120/TB -r 120",
    "each-frame.mp4": f"{_X264} -movflags frag_every_frame+empty_moov",
    "dash.mp4": f"{_X264} -movflags dash+delay_moov -frag_duration 500000",
    "negative.mp4": f"{_X264} -bf 3 -movflags negative_cts_offsets+frag_keyframe+empty_moov",
    "no-edits.mp4": f"{_X264} -bf 3 -use_editlist 0",
    "timecode.mov": f"{_X264} -timecode 01:00:00:00",
    "coarse.mp4": f"{_X264} -video_track_timescale 30",
    "live.mkv": f"{_X264} -live 1",
    "theora.ogv": "-c:v libtheora -q:v 10 -pix_fmt yuv420p",
    "flv1.flv": "-c:v flv -q:v 1",
    "b-frames.flv": f"{_X264} -bf 3",
    "wmv1.wmv": "-c:v wmv1 -q:v 1",
    "msmpeg4.avi": "-c:v msmpeg4 -q:v 1",
    "h263.3gp": "-vf scale=176:144:flags=neighbor -r 30000/1001 -c:v h263 -q:v 1",
    "avchd.mts": f"-f mpegts -mpegts_m2ts_mode 1 {_X264}",
    "wrap.ts": f"{_X264} -bf 2 -output_ts_offset 95442.7 -muxdelay 0",
    "after-sound.mkv": f"{_SOUND} -map 1 -map 0 {_X264} {_LATE}",
    "after-sound.flv": f"{_SOUND} -map 1 -map 0 {_X264} {_LATE}",
    "phone.mp4": f"{_X264} {_PHONE} -video_track_timescale 90000",
    "dropped.avi": "-c:v mpeg4 -q:v 1 -vf select=not(eq(mod(n\\,7)\\,3)) -fps_mode passthrough",
    "default.mkv": f"{_TWO} -map [c] -map [a] {_X264} -disposition:v:0 0 -disposition:v:1 default",
    "two.ts": f"{_TWO} -map [a] -map [c] {_X264}",
    "slices.mp4": f"{_X264} -x264-params slices=8",
    "refresh.mp4": f"{_X264} -x264-params intra-refresh=1:keyint=20",
    "turned90.mov": f"{_X264} -metadata:s:v rotate=90",
}
_EDITS = {
    "gap": [(0, 1), (-1, 0.3), (1, 2)],
    "trimmed": [(0.7, 1.6)],
    "parts": [(0.5, 1), (1.5, 2)],
    "reversed": [(1, 1.5), (0, 0.5)],
    "twice": [(0, 1), (0, 1)],
}
"""Stretches of the media in seconds, in the order of display; (-1, s): nothing for s seconds."""
BY_FFMPEG = (*KINDS, *(f"edited-{name}.mp4" for name in _EDITS)) if shutil.which("ffmpeg") else ()


def write_by_ffmpeg(path: Path, name: str) -> Shown:
    """Write the file; gives what ffmpeg shows of it."""
    source = f"-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r 30 -i pipe:0"
    frames = np.stack([picture(number) for number in range(NUM_FRAMES)]).tobytes()
    edits = _EDITS.get(name.removeprefix("edited-").removesuffix(".mp4"))
    options = KINDS[name] if edits is None else f"{_X264} -bf 0 -video_track_timescale 600"
    _run(f"{source} {options}", str(path), given=frames)
    if edits:
        path.write_bytes(_edited(path.read_bytes(), edits))
    return _shown(path)


def _run(options: str, *paths: str, given: bytes | None = None) -> bytes:
    command = ["ffmpeg", "-v", "error", "-y", *options.split(), *paths]
    return subprocess.run(command, input=given, capture_output=True, check=True).stdout


def _shown(path: Path) -> Shown:
    passed = "-an -sn -dn -fps_mode passthrough"
    text = _run(f"-i {path} {passed} -enc_time_base -1 -f framemd5", "-").decode().splitlines()
    head = {line.split(":")[0]: line.split(":")[1].strip() for line in text if line.startswith("#") and ":" in line}
    width, height = map(int, head["#dimensions 0"].split("x"))
    ticks = [int(line.split(",")[2]) for line in text if not line.startswith("#")]
    good = "-sws_flags bicubic+accurate_rnd+full_chroma_int"
    pixels = np.frombuffer(_run(f"-i {path} {passed} {good} -f rawvideo -pix_fmt rgb24", "-"), np.uint8)
    pictures = pixels.reshape(-1, height, width, 3)
    times = np.array(ticks) * float(Fraction(head["#tb 0"]))
    return Shown(30.0, times, np.array(numbers_in(pictures)), np.zeros(0), patches(pictures)[0])


def _edited(content: bytes, edits: list[tuple[float, float]]) -> bytes:
    """An mp4 whose header is at its end, with another edit list (ISO 14496-12, 8.6.6); ticks of 1/1000 and 1/600 s."""
    rows = [(1000 * end, -1) if start < 0 else (1000 * (end - start), 600 * start) for start, end in edits]
    body = struct.pack(">II", 0, len(rows)) + b"".join(struct.pack(">IiI", int(a), int(b), 1 << 16) for a, b in rows)
    elst = struct.pack(">I4s", 8 + len(body), b"elst") + body
    made, old = struct.pack(">I4s", 8 + len(elst), b"edts") + elst, content.index(b"edts") - 4
    (size,) = struct.unpack_from(">I", content, old)
    changed = bytearray(content[:old] + made + content[old + size :])
    for box in (b"moov", b"trak"):
        place = content.index(box) - 4
        struct.pack_into(">I", changed, place, struct.unpack_from(">I", content, place)[0] + len(made) - size)
    return bytes(changed)
