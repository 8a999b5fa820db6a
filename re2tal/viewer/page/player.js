// The video, or a clock in its place where there is no file: both play, seek and loop alike.
import { byId, seconds } from "./api.js";
import { LONG, clock } from "./timeline.js";

export class Player {
  /** `onTime(seconds)` is called whenever the time changes. */
  constructor(onTime) {
    this.onTime = onTime;
    this.video = byId("video");
    this.hasVideo = false;
    this.clock = 0;
    this.running = false;
    this.duration = 0;
    this.span = null;
    for (const name of ["seeked", "timeupdate", "loadedmetadata"]) this.video.addEventListener(name, () => this.tell());
    for (const name of ["play", "pause"]) this.video.addEventListener(name, () => this.follow());
    this.video.addEventListener("ended", () => {
      if (this.span) this.loop(this.span);
    });
    this.video.addEventListener("error", () => {
      if (this.hasVideo) this.withoutVideo("The browser cannot play this file; MP4 with H.264 plays everywhere.");
    });
    byId("speed").addEventListener("change", () => this.setSpeed());
  }

  /** Show another video; `address` is null where there is no file. */
  open(address, duration) {
    this.pause();
    this.span = null;
    this.clock = 0;
    this.duration = duration;
    this.running = false;
    this.hasVideo = address !== null;
    if (!this.hasVideo) {
      this.withoutVideo("No file of this video is known; --videos FOLDER shows it. The time axis works without.");
    } else {
      byId("no-video").hidden = true;
      this.video.hidden = false;
      this.video.src = address;
      this.setSpeed();
    }
    this.follow();
    this.tell();
  }

  withoutVideo(reason) {
    this.hasVideo = false;
    this.video.removeAttribute("src");
    this.video.load();
    this.video.hidden = true;
    byId("no-video").hidden = false;
    byId("no-video").textContent = reason;
  }

  get time() {
    return this.hasVideo ? this.video.currentTime : this.clock;
  }

  get playing() {
    return this.hasVideo ? !this.video.paused : this.running;
  }

  get speed() {
    return Number(byId("speed").value);
  }

  setSpeed() {
    this.video.playbackRate = this.speed;
  }

  seek(time) {
    const last = this.hasVideo && this.video.duration > 0 ? this.video.duration : this.duration;
    const wanted = Math.min(Math.max(time, 0), last);
    this.clock = wanted;
    if (this.hasVideo) this.video.currentTime = wanted;
    this.tell();
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  play() {
    if (this.hasVideo) {
      this.video.play().catch(() => {});
      return;
    }
    if (this.clock >= this.duration) this.clock = 0;
    this.running = true;
    this.follow();
  }

  pause() {
    this.running = false;
    if (!this.video.paused) this.video.pause();
    this.follow();
  }

  /** Play from start to end again and again; null stops that. */
  loop(span) {
    this.span = span;
    if (span) {
      this.seek(span.start);
      this.play();
    }
  }

  /** A step per picture while something moves. */
  follow() {
    byId("play").textContent = this.playing ? "Pause" : "Play";
    if (!this.playing || this.frame) return;
    let before = performance.now();
    const step = (now) => {
      this.frame = undefined;
      if (!this.hasVideo && this.running) {
        this.clock = Math.min(this.duration, this.clock + ((now - before) / 1000) * this.speed);
        if (this.clock >= this.duration && !this.span) this.pause();
      }
      before = now;
      if (this.span && (this.time >= this.span.end || this.time < this.span.start - 0.5)) this.seek(this.span.start);
      this.tell();
      if (this.playing) this.frame = requestAnimationFrame(step);
      else this.follow();
    };
    this.frame = requestAnimationFrame(step);
  }

  tell() {
    const onAxis = this.duration > LONG ? ` (${clock(this.time, 1, true)})` : "";
    byId("clock").textContent = seconds(this.time) + onAxis;
    this.onTime(this.time);
  }
}
