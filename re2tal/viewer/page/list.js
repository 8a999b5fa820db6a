// The list of videos: only the rows in sight are in the document, so thousands of videos scroll as well as ten.
import { byId, count, element } from "./api.js";

const ROW_HEIGHT = 48;
const MARGIN = 6;

const numErrors = (video) =>
  Object.entries(video.types).reduce((sum, [type, count]) => sum + (type === "true positive" ? 0 : count), 0);

export class VideoList {
  /** `onOpen(index)` is called for the video that somebody chooses. */
  constructor(onOpen) {
    this.onOpen = onOpen;
    this.videos = [];
    this.order = [];
    this.chosen = -1;
    this.box = byId("list");
    this.rows = byId("rows");
    this.drawn = new Map();
    this.box.addEventListener("scroll", () => this.schedule(), { passive: true });
    new ResizeObserver(() => this.schedule()).observe(this.box);
    this.box.addEventListener("click", (event) => {
      const row = event.target.closest(".video");
      if (row) this.onOpen(Number(row.dataset.index));
    });
    for (const id of ["search", "order"]) byId(id).addEventListener("input", () => this.arrange());
  }

  show(videos) {
    this.videos = videos;
    this.arrange();
  }

  /** Order and filter anew. `type` keeps the videos that have such an error. */
  arrange(type = byId("type-filter").value) {
    const wanted = byId("search").value.trim().toLowerCase();
    this.order = this.videos.map((_, index) => index).filter((index) => {
      const video = this.videos[index];
      return video.id.toLowerCase().includes(wanted) && (!type || !video.annotated || video.dirty || video.types[type]);
    });
    const by = {
      errors: (a, b) => numErrors(this.videos[b]) - numErrors(this.videos[a]),
      best: (a, b) => (this.videos[b].best ?? -1) - (this.videos[a].best ?? -1),
      name: (a, b) => this.videos[a].id.localeCompare(this.videos[b].id),
    }[byId("order").value];
    if (by) this.order.sort(by);
    byId("found").textContent = this.order.length === this.videos.length
      ? count(this.videos.length, "video") : `${this.order.length} of ${count(this.videos.length, "video")}`;
    this.rows.style.height = `${this.order.length * ROW_HEIGHT}px`;
    this.redraw();
  }

  /** The video `step` places on from the chosen one, or -1. */
  neighbour(step) {
    const place = this.order.indexOf(this.chosen) + step;
    return this.order[place] ?? -1;
  }

  choose(index) {
    this.chosen = index;
    const top = this.order.indexOf(index) * ROW_HEIGHT;
    if (top >= 0 && (top < this.box.scrollTop || top + ROW_HEIGHT > this.box.scrollTop + this.box.clientHeight)) {
      this.box.scrollTop = Math.max(0, top - this.box.clientHeight / 2);
    }
    this.redraw();
  }

  redraw() {
    for (const row of this.drawn.values()) row.remove();
    this.drawn.clear();
    this.draw();
  }

  schedule() {
    this.scheduled ??= requestAnimationFrame(() => {
      this.scheduled = undefined;
      this.draw();
    });
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW_HEIGHT) - MARGIN);
    const last = Math.min(this.order.length, first + Math.ceil(this.box.clientHeight / ROW_HEIGHT) + 2 * MARGIN);
    for (const [place, row] of this.drawn) {
      if (place < first || place >= last) {
        row.remove();
        this.drawn.delete(place);
      }
    }
    for (let place = first; place < last; place++) {
      if (!this.drawn.has(place)) this.drawn.set(place, this.rows.appendChild(this.row(place)));
    }
    if (this.drawn.has(this.order.indexOf(this.chosen))) {
      this.box.setAttribute("aria-activedescendant", `video-${this.chosen}`);
    } else {
      this.box.removeAttribute("aria-activedescendant");
    }
  }

  row(place) {
    const index = this.order[place];
    const video = this.videos[index];
    const row = element("div", "video");
    row.id = `video-${index}`;
    row.dataset.index = index;
    row.style.top = `${place * ROW_HEIGHT}px`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", String(index === this.chosen));
    row.setAttribute("aria-setsize", String(this.order.length));
    row.setAttribute("aria-posinset", String(place + 1));
    const missing = video.media ? "" : " · no file";
    const errors = video.annotated ? ` · ${video.truths} true · ${count(numErrors(video), "error")}` : "";
    row.append(
      element("b", "", `${video.dirty ? "● " : ""}${video.id}`),
      element("small", "", `${video.predictions} predicted${errors}${missing}`),
    );
    return row;
  }
}
