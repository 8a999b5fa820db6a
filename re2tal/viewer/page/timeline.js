// The time axis of one video: a row per class, in it the true actions above the predictions.
import { byId, element } from "./api.js";

const LANE_HEIGHT = 26;
const MAX_LANES = 6; // of predictions of one class; more than that cover each other
const LEAST_SECONDS = 0.05;
const MAX_ZOOM = 60;
const TICK_PIXELS = 76;
const STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600];
export const LONG = 120; // seconds; from then on they are counted in minutes
const LEAST_PIXELS = 8; // of a bar: both borders and what is between

const round = (time) => Math.round(time * 1000) / 1000;

/** 75 -> "1:15", and 75.2 -> "1:15.2" where steps are below a second; short videos are counted in seconds. */
export const clock = (time, step, long) => {
  const tenths = Math.round(time * 10);
  const whole = Math.floor(tenths / 10);
  const rest = step < 1 ? `.${tenths % 10}` : "";
  if (!long) return `${whole}${rest}`;
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  const end = `${String(minutes).padStart(hours ? 2 : 1, "0")}:${String(whole % 60).padStart(2, "0")}${rest}`;
  return hours ? `${hours}:${end}` : end;
};

export class Timeline {
  /** `on` holds seek(time), choose(item), loop(item) and change(action, start, end). */
  constructor(on) {
    this.on = on;
    this.box = byId("timeline");
    this.inner = byId("inner");
    this.zoom = 1;
    this.bars = new Map();
    this.view = { end: 1, duration: null, rows: [] };
    this.inner.addEventListener("pointerdown", (event) => this.press(event));
    this.inner.addEventListener("click", (event) => this.click(event));
    this.inner.addEventListener("dblclick", (event) => {
      const item = this.itemAt(event);
      if (item) this.on.loop(item);
    });
    this.box.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      this.setZoom(this.zoom * (event.deltaY < 0 ? 1.25 : 0.8), this.timeAt(event));
    }, { passive: false });
    new ResizeObserver(() => this.drawAxis()).observe(this.box);
  }

  /** `rows`: [{label, actions, predictions}]; an action may have `missed`, a prediction has `score` and `type`. */
  draw(view) {
    this.view = view;
    this.bars.clear();
    this.axis = element("div", "axis");
    this.head = element("div", "playhead");
    this.inner.replaceChildren(this.axis, ...view.rows.map((row) => this.row(row)), this.head);
    if (!view.rows.length) this.inner.append(element("p", "nothing", view.nothing));
    if (view.duration !== null && view.end > view.duration * 1.001) {
      const past = element("div", "past");
      past.style.left = this.percent(view.duration);
      past.title = "after the end of the video";
      this.inner.append(past);
    }
    this.drawAxis();
    this.choose(view.chosen);
    this.moveTo(this.time ?? 0);
  }

  row({ label, actions, predictions }) {
    const row = element("div", "row");
    const lanes = element("div", "lanes");
    lanes.setAttribute("role", "group");
    lanes.setAttribute("aria-label", label);
    const first = this.place(lanes, actions, 0, Infinity);
    const all = this.place(lanes, predictions, first, first + MAX_LANES);
    lanes.style.height = `${Math.max(all, 1) * LANE_HEIGHT}px`;
    row.append(element("div", "row-name", label), lanes);
    return row;
  }

  /** Put bars into the first free lanes from `first` on; gives the number of lanes taken. */
  place(lanes, items, first, most) {
    const taken = [];
    // What lasts no time, or ends before it starts, has a bar too, which would cover the one beside it.
    const least = (LEAST_PIXELS * this.view.end) / this.box.clientWidth;
    const drawnEnd = ({ start, end }) => Math.max(end, start + least);
    for (const item of items) {
      let lane = taken.findIndex((spans) =>
        spans.every((one) => drawnEnd(one) <= item.start || one.start >= drawnEnd(item)));
      if (lane < 0) lane = first + taken.length < most ? taken.push([]) - 1 : taken.length - 1;
      taken[lane].push(item);
      const bar = this.bar(item);
      bar.style.top = `${(first + lane) * LANE_HEIGHT + 2}px`;
      lanes.append(bar);
      this.bars.set(item, bar);
    }
    return first + taken.length;
  }

  bar(item) {
    const isTruth = item.score === undefined;
    const verdict = item.type === "true positive" ? "right" : "wrong";
    const kind = isTruth ? (item.missed ? "truth missed" : "truth") : `prediction ${item.type ? verdict : ""}`;
    const bar = element("button", `bar ${kind}`);
    bar.append(element("span", "text", isTruth ? item.label : item.score.toFixed(2)));
    bar.type = "button";
    bar.tabIndex = -1;
    if (!isTruth) bar.style.setProperty("--fill", `${Math.round(8 + 42 * Math.min(Math.max(item.score, 0), 1))}%`);
    bar.setAttribute("aria-label", describe(item));
    bar.title = describe(item);
    this.span(bar, item.start, item.end);
    return bar;
  }

  span(bar, start, end) {
    bar.style.left = this.percent(Math.max(start, 0));
    bar.style.width = this.percent(Math.max(end, start) - Math.max(start, 0));
  }

  percent(time) {
    return `${(100 * time) / this.view.end}%`;
  }

  /** Mark an item; its bar can be reached with the tabulator, and a true action has handles to drag. */
  choose(item) {
    this.inner.querySelectorAll(".handle").forEach((handle) => handle.remove());
    for (const bar of this.bars.values()) {
      bar.classList.remove("chosen");
      bar.tabIndex = -1;
    }
    const bar = this.bars.get(item);
    const reachable = bar ?? this.bars.values().next().value;
    if (reachable) reachable.tabIndex = 0;
    if (!bar) return;
    bar.classList.add("chosen");
    if (item.score === undefined) bar.append(element("span", "handle start"), element("span", "handle end"));
    this.reveal(item.start);
  }

  itemAt(event) {
    const bar = event.target.closest?.(".bar");
    return bar ? [...this.bars].find(([, one]) => one === bar)?.[0] : undefined;
  }

  timeAt(event) {
    const box = this.inner.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * this.view.end;
  }

  click(event) {
    const item = this.itemAt(event);
    if (this.dragged) this.dragged = false;
    else if (item) this.on.choose(item);
    else this.on.seek(this.timeAt(event));
  }

  /** A mouse drags at once; a finger only what is chosen, as it also scrolls. */
  press(event) {
    this.dragged = false;
    if (event.button !== 0) return;
    const item = this.itemAt(event);
    if (!item) {
      if (event.pointerType === "mouse") this.follow(event, (time) => this.on.seek(time));
      return;
    }
    const bar = this.bars.get(item);
    if (item.score !== undefined || this.view.duration === null) return;
    if (event.pointerType !== "mouse" && !bar.classList.contains("chosen")) return;
    const side = event.target.classList.contains("start") ? "start" : event.target.classList.contains("end") ? "end" : "";
    const from = this.timeAt(event);
    let moved = item;
    this.follow(event, (time) => {
      moved = this.moved(item, side, time - from);
      this.span(bar, moved.start, moved.end);
      this.on.seek(side === "end" ? moved.end : moved.start);
    }, () => {
      if (moved !== item) this.on.change(item, moved.start, moved.end);
    });
  }

  /** The span of an action after its `side` (or all of it) was dragged by so many seconds. */
  moved({ start, end }, side, by) {
    const { duration } = this.view;
    if (side === "start") return { start: round(Math.min(Math.max(start + by, 0), end - LEAST_SECONDS)), end };
    if (side === "end") return { start, end: Math.max(Math.min(round(end + by), duration), start + LEAST_SECONDS) };
    const shift = Math.min(Math.max(by, -start), Math.max(duration - end, 0));
    return { start: Math.max(round(start + shift), 0), end: Math.min(round(end + shift), duration) };
  }

  /** Call `onMove` with the time under the pointer until it is let go; less than 3 pixels are a click. */
  follow(event, onMove, onEnd = () => {}) {
    const move = (later) => {
      if (!this.dragged && Math.abs(later.clientX - event.clientX) < 3) return;
      this.dragged = true;
      onMove(this.timeAt(later));
    };
    const stop = (later) => {
      window.removeEventListener("pointermove", move);
      window.removeEventListener("pointerup", stop);
      window.removeEventListener("pointercancel", stop);
      if (this.dragged && later.type === "pointerup") onEnd();
      // The click that follows belongs to the drag.
      setTimeout(() => { this.dragged = false; });
    };
    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup", stop);
    window.addEventListener("pointercancel", stop);
  }

  setZoom(zoom, around = this.time ?? 0) {
    const offset = (around / this.view.end) * this.inner.clientWidth - this.box.scrollLeft;
    this.zoom = Math.min(Math.max(zoom, 1), MAX_ZOOM);
    this.inner.style.width = `${100 * this.zoom}%`;
    this.box.scrollLeft = (around / this.view.end) * this.inner.clientWidth - offset;
    this.drawAxis();
  }

  drawAxis() {
    if (!this.axis) return;
    const perSecond = this.inner.clientWidth / this.view.end;
    const step = STEPS.find((one) => one * perSecond >= TICK_PIXELS) ?? 3600 * Math.ceil(TICK_PIXELS / perSecond / 3600);
    const ticks = [];
    for (let count = 0; count * step <= this.view.end; count++) {
      const tick = element("span", "tick", clock(count * step, step, this.view.end > LONG));
      tick.style.left = this.percent(count * step);
      ticks.push(tick);
    }
    if (ticks.length && this.view.end <= LONG) ticks[0].textContent = "0 s";
    this.axis.replaceChildren(...ticks);
  }

  /** Scroll so that a time can be seen. */
  reveal(time) {
    const place = (time / this.view.end) * this.inner.clientWidth;
    const { scrollLeft, clientWidth } = this.box;
    if (place < scrollLeft || place > scrollLeft + clientWidth) this.box.scrollLeft = place - clientWidth / 4;
  }

  moveTo(time, isPlaying = false) {
    this.time = time;
    if (!this.head) return;
    this.head.style.left = this.percent(Math.min(time, this.view.end));
    if (isPlaying && this.zoom > 1) this.reveal(time);
  }
}

/** An action or a prediction in words. */
export function describe(item) {
  // Isolated: beside a label in Hebrew or Arabic, the first number would stand on its other side.
  const span = `\u2068${item.label}\u2069, ${item.start.toFixed(2)} to ${item.end.toFixed(2)} s`;
  if (item.score === undefined) return `true action: ${span}${item.missed ? ", missed by all predictions" : ""}`;
  return `prediction: ${span}, score ${item.score.toFixed(2)}${item.type ? `, ${item.type}` : ""}`;
}
